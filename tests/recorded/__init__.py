"""Conversations with libzmq, byte for byte, and what was said in them.

`python -m tests.recorded` records them anew from the installed libzmq: our core speaks to its sockets, with chance that is
drawn from a seed, so that encrypted conversations can be replayed as well. `test_replayed` holds them against the core and
against the drivers.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from zfabric.wire.kinds import BEAT, CLIENT_HELLO, DISPATCH, SUBMIT
from zfabric.zmtp import boxes
from zfabric.zmtp.connection import Connection
from zfabric.zmtp.curve import CurveClient, CurveServer
from zfabric.zmtp.frames import Bounds
from zfabric.zmtp.metadata import DEALER, ROUTER
from zfabric.zmtp.null import Null

FILE: Final = Path(__file__).with_name("libzmq.json")
Role = Literal["dealer", "router"]
ROLES: Final[tuple[Role, ...]] = ("dealer", "router")

_LONG: Final = bytes(range(256)) * 2
#: What the dealer says and what the router says: messages of one and of two frames, short, long and empty ones.
SAID: Final[dict[Role, list[list[bytes]]]] = {
    "dealer": [[bytes([CLIENT_HELLO]) + b"hello"], [bytes([SUBMIT]) + b"envelope", _LONG], [bytes([SUBMIT]), b""]],
    "router": [[bytes([DISPATCH]) + b"envelope", _LONG], [bytes([BEAT]) + b"\x91\x07"], [bytes([DISPATCH]), b""]],
}
BOUNDS: Final = Bounds(frame_bytes=4_096, message_frames=2, message_bytes=8_192, command_bytes=1_024)


class Conversation(Struct):
    """One recorded conversation.

    Attributes:
        handshake: Pieces in order: whether libzmq said it, and the bytes in hexadecimal.
        sent: What our side said afterwards.
        received: What libzmq said afterwards.
    """

    handshake: list[tuple[bool, str]]
    sent: str
    received: str


class Side:
    """Our side of a conversation; it says the same whenever it is made.

    Args:
        role: Ours.
        guarded: Whether there are keys.
    """

    def __init__(self, role: Role, guarded: bool) -> None:
        rng = random.Random(f"{role} {guarded}")
        self.own, self.theirs = boxes.key_pair(rng.randbytes), boxes.key_pair(rng.randbytes)
        self.role = role
        self.other: Role = "router" if role == "dealer" else "dealer"
        kind = DEALER if role == "dealer" else ROUTER
        if not guarded:
            self.connection = Connection(Null(kind), BOUNDS)
        elif role == "dealer":
            self.connection = Connection(CurveClient(kind, *self.own, self.theirs[0], rng.randbytes), BOUNDS)
        else:
            self.connection = Connection(CurveServer(kind, *self.own, lambda _: True, rng.randbytes), BOUNDS)

    def words(self) -> bytes:
        """All that it says after the handshake."""
        encode = self.connection.encode
        return b"".join(
            encode(frame, more=index < len(frames) - 1)
            for frames in SAID[self.role]
            for index, frame in enumerate(frames)
        )
