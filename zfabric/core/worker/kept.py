"""Finished answers that a worker keeps for a while: their reader may just be without a controller."""

from __future__ import annotations

from collections.abc import Iterator

from zfabric import limits
from zfabric.core.worker.backlog import Backlog
from zfabric.ids import milliseconds


class KeptAnswers:
    """Finished streams by request, oldest first, within bounds of time and memory."""

    __slots__ = ("_bytes", "_sizes", "_streams")

    def __init__(self) -> None:
        self._streams: dict[str, Backlog] = {}
        #: What each was entered with: a stream shrinks while its reader acknowledges.
        self._sizes: dict[str, int] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Backlog]:
        return iter(self._streams.values())

    def get(self, request_id: str) -> Backlog | None:
        """The finished stream of this name."""
        return self._streams.get(request_id)

    def keep(self, stream: Backlog) -> None:
        """Keep a finished stream; the oldest give way to it."""
        self.drop(stream.request_id)
        size = stream.bytes_kept
        self._streams[stream.request_id], self._sizes[stream.request_id] = stream, size
        self._bytes += size
        while self._bytes > limits.FINISHED_BYTES_MAX and len(self._streams) > 1:
            self.drop(next(iter(self._streams)))

    def drop(self, request_id: str) -> None:
        """Forget one, if it is there."""
        if self._streams.pop(request_id, None) is not None:
            self._bytes -= self._sizes.pop(request_id)

    def restart(self, now_ns: int) -> None:
        """A controller is there again: each may wait for its reader anew."""
        for stream in self._streams.values():
            stream.finished_ns = now_ns

    def expire(self, now_ns: int) -> None:
        """Forget what has waited for long enough."""
        horizon_ns = now_ns - milliseconds(limits.FINISHED_MS)
        while self._streams and next(iter(self._streams.values())).finished_ns < horizon_ns:
            self.drop(next(iter(self._streams)))
