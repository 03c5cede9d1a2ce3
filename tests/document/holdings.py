"""What a peer can make the controller hold, computed from its bounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from tests.document.markdown import table
from zfabric import limits

KIB: Final = 1024
MIB: Final = 1024 * KIB
#: What one of each takes in memory at most, its longest names included. `test_holdings` measures that they do not take more.
CONNECTION_BYTES: Final = 32 * KIB
SESSION_BYTES: Final = 16 * KIB
REQUEST_BYTES: Final = 6 * KIB
FORMER_BYTES: Final = 1 * KIB
MODEL_BYTES: Final = 12 * KIB
ALIAS_BYTES: Final = 4 * KIB
EVENT_BYTES: Final = 4 * KIB
#: A body's room may be four times what has come of it, and what has come is moved there: a quarter more than the whole.
RECEIVED_BYTES: Final = limits.FRAME_BYTES_MAX * 5 // 4 + limits.CONTROL_BODY_BYTES_MAX
#: The same before a session.
UNGREETED_BYTES: Final = limits.CONTROL_BODY_BYTES_MAX * 5 // 4 + limits.CONTROL_BODY_BYTES_MAX
#: Aliases of one model in a HELLO.
ALIASES_MAX: Final = 64


class Holding(NamedTuple):
    """Something that is held.

    Attributes:
        what: In words.
        most: How many there can be.
        each: Bytes of one.
        bound: The names of the bounds that say so.
    """

    what: str
    most: int
    each: int
    bound: str

    @property
    def size(self) -> int:
        return self.most * self.each


#: Whoever reaches the port of a controller with keys and has none: all of them together.
STRANGERS: Final = (
    Holding("connections in their handshake", limits.OPEN_HANDSHAKES_MAX, CONNECTION_BYTES, "OPEN_HANDSHAKES_MAX"),
    Holding("their commands", limits.OPEN_HANDSHAKES_MAX, limits.COMMAND_BYTES_MAX, "COMMAND_BYTES_MAX"),
)
#: Whoever reaches one listening socket of a controller without keys and opens no session: all of them together.
SILENT: Final = (
    *STRANGERS,
    Holding("connections without a session", limits.SESSIONLESS_MAX, CONNECTION_BYTES, "SESSIONLESS_MAX"),
    Holding("a message that comes", limits.SESSIONLESS_MAX, UNGREETED_BYTES, "CONTROL_BODY_BYTES_MAX"),
    Holding("what they do not read", limits.SESSIONLESS_MAX, limits.PARKED_STRANGER_BYTES_MAX, "PARKED_STRANGER_BYTES_MAX"),
)  # fmt: skip
_SESSION: Final = (
    Holding("its connection and session", 1, CONNECTION_BYTES + SESSION_BYTES, "–"),
    Holding("a message that comes", 1, RECEIVED_BYTES, "FRAME_BYTES_MAX, CONTROL_BODY_BYTES_MAX"),
    Holding("what it does not read", 1, limits.PARKED_BYTES_MAX, "PARKED_BYTES_MAX"),
    Holding("bodies over 64 KiB that it does not read", 1, limits.QUEUE_BYTES_MAX, "QUEUE_BYTES_MAX"),
)
#: One session of a client.
CLIENT: Final = (
    *_SESSION,
    Holding("requests in flight", limits.CLIENT_REQUESTS_MAX, REQUEST_BYTES, "CLIENT_REQUESTS_MAX"),
    Holding("attempts that may be made again", limits.FORMER_ATTEMPTS_MAX, FORMER_BYTES, "FORMER_ATTEMPTS_MAX"),
)
#: One session of a worker.
WORKER: Final = (
    *_SESSION,
    Holding("models", limits.WORKER_MODELS_MAX, MODEL_BYTES, "WORKER_MODELS_MAX"),
    Holding("their aliases", limits.WORKER_MODELS_MAX * ALIASES_MAX, ALIAS_BYTES, "WORKER_MODELS_MAX, 64 of each"),
    Holding("requests that it runs", limits.SLOTS_MAX, REQUEST_BYTES, "SLOTS_MAX"),
    Holding("requests that it brings", limits.LIST_LENGTH_MAX, REQUEST_BYTES, "LIST_LENGTH_MAX"),
)  # fmt: skip
#: What all peers fill together.
ALL: Final = (
    Holding("bodies that wait", 1, limits.QUEUE_BYTES_MAX, "QUEUE_BYTES_MAX"),
    Holding("models that nobody hosts any more", limits.MODELS_REMEMBERED_MAX, MODEL_BYTES, "MODELS_REMEMBERED_MAX"),
    Holding("their aliases", limits.MODELS_REMEMBERED_MAX * ALIASES_MAX, ALIAS_BYTES, "MODELS_REMEMBERED_MAX, 64 of each"),
    Holding("figures by model", limits.MEASURED_MODELS_MAX, MODEL_BYTES, "MEASURED_MODELS_MAX"),
    Holding("events for the log", limits.JOURNAL_EVENTS_MAX, EVENT_BYTES, "JOURNAL_EVENTS_MAX"),
    Holding("events for a recording", limits.RECORDED_PENDING_MAX, EVENT_BYTES, "RECORDED_PENDING_MAX"),
)  # fmt: skip


def total(holdings: Iterable[Holding]) -> int:
    """Bytes of all of them.

    Example:
        >>> total(STRANGERS) // 2**20
        144
    """
    return sum(holding.size for holding in holdings)


def holdings_table(of: str) -> str:
    """The table of "strangers", "silent", "client", "worker" or "all"."""
    holdings = {"strangers": STRANGERS, "silent": SILENT, "client": CLIENT, "worker": WORKER, "all": ALL}[of]
    rows = [
        [holding.what, f"{holding.most:,}", _size(holding.each), _size(holding.size), holding.bound]
        for holding in holdings
    ]
    rows.append(["**together**", "", "", f"**{_size(total(holdings))}**", ""])
    return table(["what", "at most", "each", "all", "bound"], rows)


def _size(count: int) -> str:
    return f"{count // KIB:,} KiB" if count < MIB else f"{count / MIB:,.0f} MiB"
