"""A client and a worker that were written from docs/protocol.md and docs/protocol/ alone, with pyzmq and msgpack.

They import nothing of zfabric. Kinds, fields and defaults are read from the pages' tables, everything else was written from their
sentences; so what works between them and a real controller is what the pages say.
"""
