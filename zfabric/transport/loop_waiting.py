"""Connections that have no session yet: how many there may be, and which one goes when there are too many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from zfabric import limits
from zfabric.transport.clock import monotonic_ns


class Ended(Protocol):
    """What waits: a connection."""

    def abort(self) -> None:
        """Close it at once."""


class Waiting:
    """Connections in one phase, the longest silent first.

    Whoever is honest is in a phase for a moment and whoever is not stays in it, so at a bound the one that has been there for the
    longest time makes room. A source displaces its own first.

    Args:
        all_max, source_max: Names of the bounds in `zfabric.limits`: of all, and of one source.
    """

    def __init__(self, all_max: str, source_max: str) -> None:
        #: Those that had to go for others.
        self.displaced = 0
        self._all_max = all_max
        self._source_max = source_max
        self._source_of: dict[Ended, str] = {}
        self._since_ns: dict[Ended, int] = {}
        self._by_source: dict[str, dict[Ended, None]] = {}

    def __len__(self) -> int:
        return len(self._since_ns)

    def begin(self, waiting: Ended, source: str) -> None:
        """One comes into this phase, or says something that counts: it is the last to go from now on.

        Args:
            waiting: The connection.
            source: An address or a user; or a key, where one is proved.
        """
        if waiting in self._since_ns:
            self._forget(waiting)
        own = self._by_source.get(source, {})
        if len(own) >= getattr(limits, self._source_max):
            self._displace(next(iter(own)))
        elif len(self._since_ns) >= getattr(limits, self._all_max):
            self._displace(next(iter(self._since_ns)))
        self._source_of[waiting] = source
        self._since_ns[waiting] = monotonic_ns()
        self._by_source.setdefault(source, {})[waiting] = None

    def again(self, waiting: Ended) -> None:
        """One that is in this phase has said something that counts."""
        source = self._source_of.get(waiting)
        if source is not None:
            self.begin(waiting, source)

    def end(self, waiting: Ended) -> None:
        """One is through, or gone. Safe to call twice."""
        if waiting in self._since_ns:
            self._forget(waiting)

    def overdue(self, ms: int) -> Iterator[Ended]:
        """Those that have been silent for so long; they are out of it."""
        before_ns = monotonic_ns() - ms * 1_000_000
        while self._since_ns:
            oldest, since_ns = next(iter(self._since_ns.items()))
            if since_ns > before_ns:
                return
            self._forget(oldest)
            yield oldest

    def _displace(self, waiting: Ended) -> None:
        self.displaced += 1
        self._forget(waiting)
        waiting.abort()

    def _forget(self, waiting: Ended) -> None:
        del self._since_ns[waiting]
        source = self._source_of.pop(waiting)
        own = self._by_source[source]
        del own[waiting]
        if not own:
            del self._by_source[source]


class Admission:
    """What stands before a session at one listening socket: a handshake, then a HELLO.

    Attributes:
        handshakes: Whose handshake is not over. Their time is bounded by the connection's own timer.
        sessionless: Whose handshake is over, and who have no session: they have said no HELLO yet, or one that was refused, or
            their session has ended. Proved keys do not wait among those that prove none.
        refused: Connections that were closed for where they come from.
    """

    def __init__(self) -> None:
        self.handshakes = Waiting("OPEN_HANDSHAKES_MAX", "SOURCE_HANDSHAKES_MAX")
        self.sessionless = Waiting("SESSIONLESS_MAX", "SOURCE_SESSIONLESS_MAX")
        self.refused = 0

    @property
    def displaced(self) -> int:
        """Those that had to go for others."""
        return self.handshakes.displaced + self.sessionless.displaced
