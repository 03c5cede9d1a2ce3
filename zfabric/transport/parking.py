"""What waits for peers whose pipes are full: in order, within a bound for each, and tried again ever more rarely.

A peer that does not read must not cost the others anything: to park a message, or to find that a peer has nothing parked,
takes the same time however much waits, and a vain try is one send.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from zfabric import limits
from zfabric.ids import RoutingId

_FIRST_NS: Final = limits.CONGESTED_RETRY_MS * 1_000_000
_LONGEST_NS: Final = limits.CONGESTED_RETRY_MAX_MS * 1_000_000


class Sent(Enum):
    """What became of a send."""

    DONE = auto()
    FULL = auto()
    GONE = auto()


class _Waiting:
    """One peer's."""

    __slots__ = ("delay_ns", "due_ns", "messages", "size")

    def __init__(self, due_ns: int) -> None:
        self.messages: deque[tuple[bytes, bytes]] = deque()
        self.size = 0
        self.delay_ns = _FIRST_NS
        self.due_ns = due_ns


class Parking:
    """Messages of peers whose pipes are full.

    Args:
        offer: Tries to send one message.
    """

    def __init__(self, offer: Callable[[RoutingId, bytes, bytes], Sent]) -> None:
        self._offer = offer
        #: By peer; who is not in it has nothing parked.
        self.peers: dict[RoutingId, _Waiting] = {}
        #: Bytes of all peers, and the most that one of them has had, with what each message costs beside its bytes.
        self.total_bytes = self.peer_bytes_max = 0
        self._due: list[tuple[int, RoutingId]] = []

    def park(self, to: RoutingId, header: bytes, body: bytes, bytes_max: int, now_ns: int) -> bool:
        """Keep a message for later. False if the peer has more than it may, and nothing was kept."""
        waiting = self.peers.get(to)
        size = len(header) + len(body) + limits.PARKED_MESSAGE_BYTES
        if (waiting.size if waiting is not None else 0) + size > bytes_max:
            return False
        if waiting is None:
            waiting = self.peers[to] = _Waiting(now_ns + _FIRST_NS)
            heapq.heappush(self._due, (waiting.due_ns, to))
        waiting.messages.append((header, body))
        waiting.size += size
        self.total_bytes += size
        self.peer_bytes_max = max(self.peer_bytes_max, waiting.size)
        return True

    def forget(self, peer: RoutingId) -> None:
        """Drop what is parked for a peer."""
        waiting = self.peers.pop(peer, None)
        if waiting is not None:
            self.total_bytes -= waiting.size

    def next_ns(self) -> int | None:
        """When `retry` is due, None while nothing is parked."""
        return self._due[0][0] if self._due else None

    def retry(self, now_ns: int) -> list[RoutingId]:
        """Try those that are due. Returns peers that are gone; nothing is parked for them any more."""
        gone: list[RoutingId] = []
        while self._due and self._due[0][0] <= now_ns:
            due_ns, peer = heapq.heappop(self._due)
            waiting = self.peers.get(peer)
            # A peer that was forgotten leaves its entry behind.
            if waiting is not None and waiting.due_ns == due_ns and not self.retry_one(peer, now_ns):
                gone.append(peer)
        return gone

    def retry_one(self, peer: RoutingId, now_ns: int) -> bool:
        """Send what is parked for one peer, as far as its pipe takes it, and a burst at the most. False if it is gone."""
        waiting = self.peers[peer]
        messages = waiting.messages
        sent = Sent.DONE
        count = 0
        while messages and count < limits.BURST_MESSAGES_MAX:
            header, body = messages[0]
            sent = self._offer(peer, header, body)
            if sent is not Sent.DONE:
                break
            messages.popleft()
            count += 1
            size = len(header) + len(body) + limits.PARKED_MESSAGE_BYTES
            waiting.size -= size
            self.total_bytes -= size
        if sent is Sent.GONE:
            self.forget(peer)
            return False
        if not messages:
            del self.peers[peer]
            return True
        if sent is Sent.DONE:
            waiting.due_ns = now_ns + 1
        else:
            waiting.delay_ns = _FIRST_NS if count else min(waiting.delay_ns * 2, _LONGEST_NS)
            waiting.due_ns = now_ns + waiting.delay_ns
        heapq.heappush(self._due, (waiting.due_ns, peer))
        return True
