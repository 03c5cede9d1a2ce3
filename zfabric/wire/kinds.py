"""Message kinds: the first byte of every message.

Three families, told apart by what the controller reads:

* **data plane** (`CHUNKS`): one frame; its first five bytes are the routing key, the rest is opaque;
* **passing** (`SUBMIT`, `DISPATCH`, `ENDS`): a frame with a MessagePack envelope, then one with a body, which is opaque;
* **control** (all others): one frame, a MessagePack struct that the receiver decodes whole.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1

CHUNKS: Final = 0x01

ENDS: Final = 0x10
SUBMIT: Final = 0x11
DISPATCH: Final = 0x12

CLIENT_HELLO: Final = 0x20
WORKER_HELLO: Final = 0x21
WELCOME: Final = 0x22
REFUSED: Final = 0x23
UNKNOWN_SESSION: Final = 0x24
BEAT: Final = 0x25
LOAD: Final = 0x26
GOODBYE: Final = 0x27
CANCEL: Final = 0x28
CREDIT: Final = 0x29
GRANT: Final = 0x2A
ABORT: Final = 0x2B
QUERY: Final = 0x2C
ANSWER: Final = 0x2D
FAULT: Final = 0x2E
DRAIN: Final = 0x2F

NAMES: Final[dict[int, str]] = {
    value: name
    for name, value in list(globals().items())
    if name.isupper() and isinstance(value, int) and value >= 1 and name != "PROTOCOL_VERSION"
}

#: The kinds with a second frame are those from 0x10 to 0x1f, also the ones that a later version may add.
WITH_BODY: Final = frozenset(range(0x10, 0x20))

FROM_CLIENT: Final = frozenset({CLIENT_HELLO, SUBMIT, CANCEL, CREDIT, QUERY, BEAT, GOODBYE})
FROM_WORKER: Final = frozenset({WORKER_HELLO, CHUNKS, ENDS, LOAD, GOODBYE})
TO_CLIENT: Final = frozenset({WELCOME, REFUSED, UNKNOWN_SESSION, CHUNKS, ENDS, ANSWER, BEAT, FAULT})
TO_WORKER: Final = frozenset({WELCOME, REFUSED, UNKNOWN_SESSION, DISPATCH, ABORT, GRANT, BEAT, DRAIN, FAULT})
