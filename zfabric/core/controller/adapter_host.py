"""A worker that offers adapters: what it has loaded, what it was asked for, and how that went.

Bounds: it offers WORKER_MODELS_MAX · LOADABLE_MAX names at most, and all that is kept here is of names that it offers.
"""

from __future__ import annotations

from collections import OrderedDict

from zfabric.core.controller.hosting import Hosting
from zfabric.core.controller.peers import WorkerPeer
from zfabric.core.timers import Timer
from zfabric.ids import milliseconds
from zfabric.limits import ADAPTER_COLD_MS, ADAPTER_RETRY_MS, ADAPTER_RETRY_MS_MAX


def hosts_wanted(demand: int, spread: int) -> int:
    """``ceil(demand / spread)``: how many hosts an adapter of so many requests, running and waiting, should have.

    Example:
        >>> [hosts_wanted(demand, 32) for demand in (0, 1, 32, 33)]
        [0, 1, 1, 2]
    """
    return -(-demand // spread)


class Job:
    """A call to a worker.

    Attributes:
        number: Of the request that it is.
        load: Whether it loads; else it unloads.
        ended: Whether its worker has ended it, and what came of it is to be announced yet.
        late: Whether its time is over.
    """

    __slots__ = ("began_ns", "ended", "late", "load", "name", "number", "timer")

    def __init__(self, name: str, number: int, began_ns: int, *, load: bool) -> None:
        self.name = name
        self.number = number
        self.began_ns = began_ns
        self.load = load
        self.ended = self.late = False
        self.timer: Timer | None = None


class AdapterHost:
    """One worker, as long as its session lasts.

    Attributes:
        bases: The names that it offers, and the model that each belongs to.
        used: Those that it has loaded, by when one was last in use, the least recently used first; and when each was loaded.
        job: What it was asked and has not done.
        leaving: What gets no new requests here, and is unloaded when the last one has ended; "" for none.
        room_for: The name that this is done for; "" for none.
        failures: By name, how often it failed in a row, and until when it is not asked again.
        cold_s: Exponentially weighted mean time of its loads.
    """

    __slots__ = (
        "_measured",
        "bases",
        "cold_s",
        "failures",
        "job",
        "leaving",
        "loaded_ns",
        "room_for",
        "used",
        "worker",
    )

    def __init__(self, worker: WorkerPeer) -> None:
        self.worker = worker
        self.bases: dict[str, str] = {}
        self.used: OrderedDict[str, int] = OrderedDict()
        self.loaded_ns: dict[str, int] = {}
        self.job: Job | None = None
        self.leaving = self.room_for = ""
        self.failures: dict[str, tuple[int, int]] = {}
        self.cold_s = ADAPTER_COLD_MS / 1_000
        self._measured = False

    @property
    def name(self) -> str:
        """The worker's."""
        return self.worker.name

    @property
    def ratio(self) -> float:
        """Its load over its speed."""
        return next(iter(self.worker.hosts.values())).queue_ratio

    # ── what may be asked of it ─────────────────────────────────────────────────────────────────────────────────────

    def loads(self, name: str) -> bool:
        """Whether it loads an adapter now."""
        return self.job is not None and self.job.load and self.job.name == name and not self.job.late

    def failed(self, name: str, now_ns: int) -> bool:
        """Whether it failed at a name, and is not to be asked yet."""
        failure = self.failures.get(name)
        return failure is not None and now_ns < failure[1]

    def may_try(self, name: str, now_ns: int) -> bool:
        """Whether it may be asked for a name again."""
        return not self.failed(name, now_ns)

    def usable(self, name: str, now_ns: int) -> bool:
        """Whether it could load a name, now or when it has a place: it takes requests, its model's circuit is closed, and it has
        not just failed at this."""
        base = self.worker.hosts.get(self.bases.get(name, ""))
        if base is None or not base.taking or self.failed(name, now_ns):
            return False
        return base.circuit is None or not base.circuit.out

    # ── what it has loaded ──────────────────────────────────────────────────────────────────────────────────────────

    def note_loaded(self, now_ns: int) -> None:
        """Its worker has announced what it serves."""
        for name in [name for name in self.used if name not in self.worker.hosts or name not in self.bases]:
            del self.used[name]
            del self.loaded_ns[name]
        for name in self.worker.hosts:
            if name in self.bases and name not in self.used:
                self.used[name] = self.loaded_ns[name] = now_ns

    def use(self, name: str, now_ns: int) -> None:
        """A request goes to an adapter."""
        self.used[name] = now_ns
        self.used.move_to_end(name)

    def note_running(self, now_ns: int) -> None:
        """What has requests is in use."""
        for name in [name for name in self.used if self.worker.hosts[name].live]:
            self.use(name, now_ns)

    def idle(self) -> str | None:
        """The least recently used adapter that nobody needs: no request runs on it here or waits for it, and it is not pinned."""
        return next(
            (name for name in self.used if not self._hosting(name).live and self._may_go(self._hosting(name))), None
        )

    def oldest(self, since_ns: int) -> str | None:
        """The adapter that was loaded the longest ago, before then, and is not pinned."""
        known = [
            (loaded_ns, name)
            for name, loaded_ns in self.loaded_ns.items()
            if loaded_ns <= since_ns and not _pinned(self._hosting(name))
        ]
        return min(known)[1] if known else None

    def leave(self, name: str, wanted: str) -> None:
        """Have an adapter get no new requests here."""
        self.leaving, self.room_for = name, wanted
        self._hosting(name).leaving = True

    def stay(self) -> None:
        """What was to go stays, or is gone."""
        hosting = self.worker.hosts.get(self.leaving)
        if hosting is not None:
            hosting.leaving = False
        self.leaving = self.room_for = ""

    def _hosting(self, name: str) -> Hosting:
        return self.worker.hosts[name]

    def _may_go(self, hosting: Hosting) -> bool:
        return not hosting.model.queue and not _pinned(hosting)

    # ── how its calls go ────────────────────────────────────────────────────────────────────────────────────────────

    def fail(self, name: str, now_ns: int) -> None:
        """A call failed. Nothing is remembered of a name that is offered no more."""
        if name not in self.bases:
            return
        times = self.failures.get(name, (0, 0))[0] + 1
        wait_ms = min(ADAPTER_RETRY_MS << min(times - 1, 16), ADAPTER_RETRY_MS_MAX)
        self.failures[name] = (times, now_ns + milliseconds(wait_ms))

    def measured(self, taken_ns: int) -> None:
        """A load took so long."""
        taken_s = taken_ns / 1e9
        self.cold_s = 0.8 * self.cold_s + 0.2 * taken_s if self._measured else taken_s
        self._measured = True


def _pinned(hosting: Hosting) -> bool:
    return hosting.info.details.get("pinned") is True
