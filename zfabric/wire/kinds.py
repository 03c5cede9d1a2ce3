"""Message kinds: the first byte of every message.

Three families, told apart by what the controller reads:

* **data plane** (`CHUNKS`): one frame; its first five bytes are the routing key, the rest is opaque;
* **passing** (`SUBMIT`, `DISPATCH`, `ENDS`): a frame with a MessagePack envelope, then one with a body, which is opaque;
* **control** (all others): one frame, a MessagePack struct that the receiver decodes whole.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

PROTOCOL_VERSION: Final = 2
#: What peers of one version know beyond what all of them know: see docs/protocol.md, "Versions".
MINOR_VERSION: Final = 4


class Kind(IntEnum):
    """The first byte of a message."""

    CHUNKS = 0x01
    ENDS = 0x10
    SUBMIT = 0x11
    DISPATCH = 0x12
    CLIENT_HELLO = 0x20
    WORKER_HELLO = 0x21
    WELCOME = 0x22
    REFUSED = 0x23
    UNKNOWN_SESSION = 0x24
    BEAT = 0x25
    LOAD = 0x26
    GOODBYE = 0x27
    CANCEL = 0x28
    CREDIT = 0x29
    GRANT = 0x2A
    ABORT = 0x2B
    QUERY = 0x2C
    ANSWER = 0x2D
    FAULT = 0x2E
    DRAIN = 0x2F
    CLAIMS = 0x30
    CARRIED = 0x31
    LOCATE = 0x32
    LOCATED = 0x33


# Names of their own, because to look one up in the enum costs as much as the comparison that it is for.
CHUNKS: Final = Kind.CHUNKS
ENDS: Final = Kind.ENDS
SUBMIT: Final = Kind.SUBMIT
DISPATCH: Final = Kind.DISPATCH
CLIENT_HELLO: Final = Kind.CLIENT_HELLO
WORKER_HELLO: Final = Kind.WORKER_HELLO
WELCOME: Final = Kind.WELCOME
REFUSED: Final = Kind.REFUSED
UNKNOWN_SESSION: Final = Kind.UNKNOWN_SESSION
BEAT: Final = Kind.BEAT
LOAD: Final = Kind.LOAD
GOODBYE: Final = Kind.GOODBYE
CANCEL: Final = Kind.CANCEL
CREDIT: Final = Kind.CREDIT
GRANT: Final = Kind.GRANT
ABORT: Final = Kind.ABORT
QUERY: Final = Kind.QUERY
ANSWER: Final = Kind.ANSWER
FAULT: Final = Kind.FAULT
DRAIN: Final = Kind.DRAIN
CLAIMS: Final = Kind.CLAIMS
CARRIED: Final = Kind.CARRIED
LOCATE: Final = Kind.LOCATE
LOCATED: Final = Kind.LOCATED

NAMES: Final[dict[int, str]] = {int(kind): kind.name for kind in Kind}

#: The kinds with a second frame are those from 0x10 to 0x1f, also the ones that a later version may add.
WITH_BODY: Final = frozenset(range(0x10, 0x20))

FROM_CLIENT: Final = frozenset({CLIENT_HELLO, SUBMIT, CANCEL, CREDIT, QUERY, BEAT, GOODBYE, CLAIMS})
FROM_WORKER: Final = frozenset({WORKER_HELLO, CHUNKS, ENDS, LOAD, GOODBYE, CARRIED, LOCATED})
TO_CLIENT: Final = frozenset({WELCOME, REFUSED, UNKNOWN_SESSION, CHUNKS, ENDS, ANSWER, BEAT, FAULT, GOODBYE})
TO_WORKER: Final = frozenset(
    {WELCOME, REFUSED, UNKNOWN_SESSION, DISPATCH, ABORT, GRANT, BEAT, DRAIN, FAULT, GOODBYE, LOCATE}
)
