"""What docs/protocol.md and docs/protocol/ say of the code, taken from the code.

Parts of those pages stand between `<!-- generated: NAME -->` and `<!-- end -->`. After a change of a message, a bound, an
error or a state, write them anew:

    python -m tests.document

`test_pages` fails while they differ from what the code says. The meaning of a field is its line under `Attributes:` in the
docstring of its struct.
"""
