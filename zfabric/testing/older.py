"""Messages as version 2.0 has them: what a peer of the released version says, and what it understands of what is said to it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.wire import kinds

#: How many fields messages had in version 2.0. A peer of that version says no more of them, and looks at no more.
FIELDS: Final[dict[int, int]] = {
    kinds.ENDS: 3,
    kinds.SUBMIT: 9,
    kinds.DISPATCH: 11,
    kinds.CLIENT_HELLO: 7,
    kinds.WORKER_HELLO: 10,
    kinds.WELCOME: 8,
    kinds.REFUSED: 6,
    kinds.BEAT: 1,
    kinds.LOAD: 10,
    kinds.GOODBYE: 1,
    kinds.CANCEL: 1,
    kinds.CREDIT: 1,
    kinds.GRANT: 3,
    kinds.ABORT: 2,
    kinds.QUERY: 3,
    kinds.ANSWER: 6,
    kinds.FAULT: 6,
    kinds.DRAIN: 1,
    kinds.CLAIMS: 1,
    kinds.CARRIED: 1,
}
#: Where a worker's HELLO has its models and its load, and how many fields a model had.
_MODELS: Final = 4
_LOAD: Final = 5
_MODEL_FIELDS: Final = 10
#: Where ENDS has its terminals, and how many fields one had.
_ENDS: Final = 1
_END_FIELDS: Final = 3
#: Where a client's HELLO and CLAIMS have their claims, and how many fields a claim had.
_CLAIMS: Final[dict[int, int]] = {kinds.CLIENT_HELLO: 4, kinds.CLAIMS: 0}
_CLAIM_FIELDS: Final = 5


def as_of_2_0(header: bytes) -> bytes:
    """The first frame of a message without the fields that came later."""
    count = FIELDS.get(header[0])
    if count is None or len(header) == 1:
        return header
    fields: list[Any] = msgspec.msgpack.decode(header[1:])[:count]
    if header[0] == kinds.WORKER_HELLO:
        fields[_MODELS] = [model[:_MODEL_FIELDS] for model in fields[_MODELS]]
        fields[_LOAD] = fields[_LOAD][: FIELDS[kinds.LOAD]]
    if header[0] == kinds.ENDS:
        fields[_ENDS] = [end[:_END_FIELDS] for end in fields[_ENDS]]
    if (place := _CLAIMS.get(header[0])) is not None:
        fields[place] = [claim[:_CLAIM_FIELDS] for claim in fields[place]]
    return header[:1] + msgspec.msgpack.encode(fields)
