"""What a worker's session tells its controller of the worker: its load, its slots, and what its engines have cached."""

from __future__ import annotations

from typing import Final

from msgspec import structs

from zfabric import limits
from zfabric.core.timers import Timer, Timers
from zfabric.core.worker.cached import CacheChange, CacheReports
from zfabric.core.worker.observer import WorkerObserver
from zfabric.core.worker.siblings import Siblings
from zfabric.core.worker.streams import WorkerStreams
from zfabric.ids import milliseconds
from zfabric.wire import codec
from zfabric.wire.load import Load

#: From this minor version on a controller reads what is cached.
_CACHED_MINOR: Final = 3
#: From this one on it knows that a worker may have other controllers.
_SHARED_MINOR: Final = 4


class WorkerReports(WorkerStreams):
    """Adds to the requests of a session what is said of the worker.

    Args:
        name, stream_interval, load, observer, siblings: As of `StreamTables`.

    Attributes:
        wanting: How many clients wait at the controller for a slot of this worker, as it said last.
        told_elsewhere: What it was told last of the slots that others have.
    """

    def __init__(
        self,
        name: str,
        stream_interval: int,
        load: Load | None = None,
        observer: WorkerObserver | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        super().__init__(name, stream_interval, load, observer, siblings)
        self.timers = Timers()
        self.wanting = 0
        self.told_elsewhere = 0
        self._minor = 0
        self._dispatches = 0
        self._cached = CacheReports()
        self._cached_timer: Timer | None = None
        self._share_timer: Timer | None = None
        self._want_timer: Timer | None = None
        self._shared_ns = 0

    def report(self, now_ns: int, *, streams: bool = False) -> None:
        """Send the load now, if anybody listens, and if it is asked for how far each of the `streams` is."""
        if not self.registered:
            return
        held = self.held if self._siblings is None else self._siblings.held
        self.load.running = max(0, held + len(self._calls) - self.load.waiting)
        load = self._load_for(self._elsewhere())
        load.dispatches = self._dispatches
        load.streams = self.units_made() if streams else []
        self.outbox.append(codec.pack(load))
        load.streams = []

    def _elsewhere(self) -> int:
        """Slots that are for other controllers, which this one is about to be told."""
        if self._siblings is None:
            return 0
        self._shared_ns = self._now_ns
        self.told_elsewhere = self._siblings.elsewhere(self)
        return self.told_elsewhere

    def _load_for(self, elsewhere: int) -> Load:
        """How the worker is, for a controller that is to have all but so many of its slots."""
        load = self.load
        if not elsewhere:
            return load
        if self._minor >= _SHARED_MINOR:
            return structs.replace(load, elsewhere=elsewhere)
        return structs.replace(load, slots=max(0, load.slots - elsewhere))

    def share(self, now_ns: int) -> None:
        """The slots that are for this controller may be more or fewer than it knows. It is told at once if it waits for one, else
        a little later, with whatever else changes."""
        if self._siblings is None or not self.registered or self._share_timer is not None:
            return
        elsewhere, told = self._siblings.elsewhere(self), self.told_elsewhere
        if elsewhere == told:
            return
        due_ns = self._shared_ns + milliseconds(limits.SHARE_TELL_MS)
        if now_ns >= due_ns or (elsewhere < told and self.load.slots - told <= self.held):
            self._now_ns = now_ns
            self.report(now_ns)
        else:
            self._share_timer = self.timers.at(due_ns, self._share_due)

    def _share_due(self, now_ns: int) -> None:
        self._share_timer = None
        self.share(now_ns)

    def cached(self, change: CacheChange, now_ns: int) -> None:
        """An engine's cache changed. What becomes of it in PREFIX_TELL_MS is told at once."""
        self._cached.changed(change)
        self._tell_cached_later(now_ns)

    def _tell_cached_later(self, now_ns: int) -> None:
        tells = self.registered and self._minor >= _CACHED_MINOR
        if tells and self._cached_timer is None and self._cached.due:
            self._cached_timer = self.timers.at(now_ns + milliseconds(limits.PREFIX_TELL_MS), self._tell_cached)

    def _tell_cached(self, now_ns: int) -> None:
        self._cached_timer = None
        self.load.cached = self._cached.take()
        self.report(now_ns)
        self.load.cached = []
        self._tell_cached_later(now_ns)

    def wanted(self, clients: int, now_ns: int) -> None:
        """So many clients wait at the controller; it says so again in time, or they wait no more."""
        self.timers.cancel(self._want_timer)
        self._want_timer = None
        self.wanting = clients
        if clients and self._siblings is not None:
            self._want_timer = self.timers.at(now_ns + milliseconds(limits.WANTING_MS), self._unwanted)

    def _unwanted(self, _: int) -> None:
        self._want_timer = None
        self.wanting = 0

    def tell_nothing(self) -> None:
        """There is nobody to tell."""
        self.timers.cancel(self._cached_timer)
        self.timers.cancel(self._share_timer)
        self.wanted(0, 0)
        self._cached_timer = self._share_timer = None
