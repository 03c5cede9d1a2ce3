"""What waits for readers that do not read: bounds, order, and how often it is tried again."""

from __future__ import annotations

from zfabric import limits
from zfabric.ids import RoutingId
from zfabric.transport.parking import Parking, Sent

A, B = RoutingId(b"a"), RoutingId(b"b")
MS = 1_000_000


class Pipes:
    """Pipes that are full, or not, or gone; counts what is tried."""

    def __init__(self) -> None:
        self.room: dict[RoutingId, int | None] = {A: 0, B: 0}
        self.sent: list[tuple[RoutingId, bytes]] = []
        self.tries = 0
        self.parking = Parking(self.offer)

    def offer(self, to: RoutingId, header: bytes, body: bytes) -> Sent:
        self.tries += 1
        room = self.room[to]
        if room is None:
            return Sent.GONE
        if room == 0:
            return Sent.FULL
        self.room[to] = room - 1
        self.sent.append((to, header))
        return Sent.DONE

    def park(self, to: RoutingId, count: int, bytes_max: int = 1 << 30, now_ns: int = 0) -> bool:
        return all(self.parking.park(to, b"%d" % number, b"", bytes_max, now_ns) for number in range(count))

    def run(self, until_ns: int) -> list[RoutingId]:
        """Let time pass, as a loop with one timer does."""
        gone: list[RoutingId] = []
        while (at_ns := self.parking.next_ns()) is not None and at_ns <= until_ns:
            gone += self.parking.retry(at_ns)
        return gone


def test_a_reader_that_does_not_read_is_tried_ever_more_rarely() -> None:
    """However much waits for it, a vain try is one send; in a minute there are fewer tries than seconds twice."""
    pipes = Pipes()
    assert pipes.park(A, 20_000)
    pipes.run(60_000 * MS)
    assert pipes.tries <= 60_000 // limits.CONGESTED_RETRY_MAX_MS + 10
    assert not pipes.sent


def test_what_waits_leaves_in_order_and_in_bursts() -> None:
    pipes = Pipes()
    assert pipes.park(A, 1_000)
    pipes.room[A] = 10_000
    first = pipes.parking.next_ns()
    assert first == limits.CONGESTED_RETRY_MS * MS
    assert pipes.parking.retry(first) == []
    assert len(pipes.sent) == limits.BURST_MESSAGES_MAX
    pipes.run(first + 100)
    assert pipes.sent == [(A, b"%d" % number) for number in range(1_000)]
    assert pipes.tries == 1_000
    assert pipes.parking.peers == {}
    assert pipes.parking.total_bytes == 0
    assert pipes.parking.next_ns() is None


def test_a_reader_that_reads_slowly_is_tried_often() -> None:
    """Progress begins the delays anew."""
    pipes = Pipes()
    assert pipes.park(A, 100)
    pipes.run(5_000 * MS)
    for _ in range(50):
        pipes.room[A] = 1
        at_ns = pipes.parking.next_ns() or 0
        pipes.parking.retry(at_ns)
        assert pipes.parking.next_ns() == at_ns + limits.CONGESTED_RETRY_MS * MS
    assert len(pipes.sent) == 50


def test_each_peer_has_a_bound_and_a_message_costs_more_than_its_bytes() -> None:
    pipes = Pipes()
    bound = 100 * limits.PARKED_MESSAGE_BYTES
    assert pipes.park(A, 90, bound)
    assert not pipes.park(A, 20, bound)
    assert pipes.park(B, 90, bound)
    assert pipes.parking.peer_bytes_max <= bound
    assert pipes.parking.total_bytes > 180 * limits.PARKED_MESSAGE_BYTES
    pipes.parking.forget(A)
    assert set(pipes.parking.peers) == {B}
    pipes.parking.forget(B)
    assert pipes.parking.total_bytes == 0
    assert pipes.run(60_000 * MS) == []
    assert pipes.tries == 0


def test_a_peer_that_is_gone_is_told_once_and_has_nothing_parked() -> None:
    pipes = Pipes()
    assert pipes.park(A, 3)
    assert pipes.park(B, 3)
    pipes.room = {A: None, B: 3}
    assert pipes.run(1_000 * MS) == [A]
    assert pipes.parking.peers == {}
    assert len(pipes.sent) == 3
