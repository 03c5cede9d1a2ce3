"""Adapters that are loaded where they are wanted: which worker is asked to load one or to unload one, and when.

A worker offers names of adapters with the model that they belong to (`ModelInfo.loadable`). A request for a name that is offered,
and that nobody serves, waits in its queue like any other while one worker is asked to load it, by an operator's call that the
controller makes itself. A loaded adapter is a model of its own, and dispatched like any other.

* how many: ``ceil((running + waiting) / adapter_spread)`` hosts (`hosts_wanted`), of those that offer it and take requests;
* where: of the workers with a place free the least loaded one, by requests over speed, then the one with fewest adapters;
* which goes: where all `adapters_per_host` places are taken, the least recently used adapter that no request runs on or waits
  for; if there is none, and a name without any host has waited for ADAPTER_TURN_MS, the one that was loaded the longest ago gets
  no new requests there and goes when its last one has ended. Nothing is unloaded on which a request runs;
* idle: what nobody has used for `adapter_idle_ms` is unloaded;
* failures: a worker that failed at a name is not asked for it again for ADAPTER_RETRY_MS, twice as long each time after. Where
  every worker that could has failed, what waits ends with NoWorkerError.

One worker has one such call at a time. All that is known here is learnt from announcements, so a new controller knows it as
soon as its workers are back.
"""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Callable

from zfabric.core.controller.adapter_host import AdapterHost, Job, hosts_wanted
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.hosting import Hosting
from zfabric.core.controller.journal import Journal
from zfabric.core.controller.outbox import Outbox
from zfabric.core.controller.peers import Request, WorkerPeer
from zfabric.core.controller.registry import Registry
from zfabric.core.timers import Timer, Timers
from zfabric.errors import FabricError, NoWorkerError
from zfabric.ids import milliseconds
from zfabric.limits import ADAPTER_LOAD_MS, ADAPTER_LOOK_MS, ADAPTER_TURN_MS, COMPARED_MAX
from zfabric.wire import codec
from zfabric.wire.flow import Abort
from zfabric.wire.messages import Dispatch
from zfabric.wire.payloads import OperateRequest


class Adapters:
    """Has adapters loaded and unloaded.

    Args:
        rng: Draws the instance under which the controller makes its calls.

    Attributes:
        instance: Whose the calls are: terminals for it are for `ended`.
        give_up: Ends a request that waits in vain.
        fill: Gives a worker what waits.
    """

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        timers: Timers,
        outbox: Outbox,
        journal: Journal,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._registry = registry
        self._timers = timers
        self._outbox = outbox
        self._journal = journal
        self._numbers = itertools.count(1)
        #: Workers that offer adapters, by name; and by adapter's name, those that offer it.
        self._hosts: dict[str, AdapterHost] = {}
        self._offers: dict[str, dict[str, AdapterHost]] = {}
        #: Names to look at in the next turn; and those that wait for a place, since when, the longest first.
        self._dirty: dict[str, None] = {}
        self._waiting: OrderedDict[str, int] = OrderedDict()
        self._look: Timer | None = None
        self._rng = rng
        self.instance = -1
        self.give_up: Callable[[Request, FabricError], None] = lambda request, error: None
        self.fill: Callable[[WorkerPeer], None] = lambda worker: None

    # ── what others ask ─────────────────────────────────────────────────────────────────────────────────────────────

    def offered(self, name: str) -> bool:
        """Whether a worker offers an adapter of this name.

        Raises:
            NoWorkerError: All that do have failed to load it, a short while ago.
        """
        offers = self._offers.get(name)
        if not offers or not self._config.adapters_per_host:
            return False
        now_ns = self._timers.now_ns
        if all(host.failed(name, now_ns) for host in offers.values()):
            raise self._cannot(name, offers)
        return True

    def awaited(self, name: str) -> str:
        """What a name is waited for that nobody takes requests of, in words; "" where that is in vain."""
        offers = self._offers.get(name)
        if not offers or not self._config.adapters_per_host:
            return ""
        for host in offers.values():
            if host.loads(name):
                return f"worker {host.name!r} is loading adapter {name!r}"
        now_ns = self._timers.now_ns
        able = sum(host.usable(name, now_ns) for host in offers.values())
        return f"adapter {name!r} waits for a place at one of {len(offers)} workers that offer it" if able else ""

    def cold_s(self, name: str) -> float:
        """What it takes until one more host has an adapter, in seconds: the least measured at one that offers it and has it not,
        `limits.ADAPTER_COLD_MS` before any was; 0.0 where there is none. Costs O(hosts that offer it)."""
        offers = self._offers.get(name, {})
        return min((host.cold_s for host in offers.values() if name not in host.worker.hosts), default=0.0)

    # ── what happens ────────────────────────────────────────────────────────────────────────────────────────────────

    def announced(self, worker: WorkerPeer) -> None:
        """A worker has said what it serves and what it offers."""
        bases = {name: hosting for hosting in worker.hosts.values() for name in hosting.info.loadable}
        host = self._hosts.get(worker.name)
        if host is None and not bases:
            return
        if host is None or host.worker is not worker:
            host = self._hosts[worker.name] = AdapterHost(worker)
        for name in [name for name in host.bases if name not in bases]:
            self._withdraw(host, name)
        host.bases = {name: hosting.model.name for name, hosting in bases.items()}
        for name in bases:
            self._offers.setdefault(name, {})[host.name] = host
            if name in self._registry.models:
                self._dirty[name] = None
        host.note_loaded(self._timers.now_ns)
        self._proceed(host)
        if host.job is None and host.leaving and host.leaving not in bases:
            self._release(host)
        if host.used:
            self._look_later()

    def gone(self, worker: WorkerPeer) -> None:
        """A worker's session is over."""
        host = self._hosts.get(worker.name)
        if host is not None and host.worker is worker:
            for name in host.bases:
                self._withdraw(host, name)
            del self._hosts[host.name]
            if host.job is not None:
                self._timers.cancel(host.job.timer)

    def asked(self, name: str) -> None:
        """A request of a model came to wait."""
        if name in self._offers:
            self._dirty[name] = None

    def dispatched(self, host: Hosting) -> None:
        """A request of a model goes to a worker."""
        name = host.model.name
        if name in self._offers:
            self._dirty[name] = None
            holder = self._hosts.get(host.name)
            if holder is not None and name in holder.used:
                holder.use(name, self._timers.now_ns)

    def ended(self, worker: WorkerPeer, number: int, code: int) -> None:
        """A worker ended a call of the controller's."""
        host = self._hosts.get(worker.name)
        job = host.job if host is not None else None
        if host is None or job is None or job.number != number:
            return
        job.ended = True
        # Somebody else may have done it before: then an error says no more than that.
        done = not code or (job.name in worker.hosts) is job.load
        if job.late or not done:
            self._failed(host, job, f"error {code}" if code else "it came too late")
        else:
            self._proceed(host)

    def freed(self, worker: WorkerPeer) -> None:
        """Requests at a worker have ended."""
        host = self._hosts.get(worker.name)
        if host is not None and host.leaving and host.job is None:
            self._unload_leaving(host)

    def settle(self) -> None:
        """Ask for what is wanted since the last turn: who has waited longest goes first. Costs O(names · hosts that offer them),
        of no more names than COMPARED_MAX and those that changed."""
        while self._dirty:
            dirty, self._dirty = self._dirty, {}
            for name in [*itertools.islice(self._waiting, COMPARED_MAX), *dirty]:
                self._see_to(name)

    # ── who gets a place ────────────────────────────────────────────────────────────────────────────────────────────

    def _see_to(self, name: str) -> None:
        """Have one more host of a name, if it wants one and there is one."""
        model, offers = self._registry.models.get(name), self._offers.get(name)
        off = not self._config.adapters_per_host or name in self._registry.directives.paused
        if model is None or not offers or off:
            self._waiting.pop(name, None)
            return
        copies = sum(host.taking and not host.leaving for host in model.hosts.values())
        loading = sum(host.loads(name) for host in offers.values())
        demand = len(model.queue) + sum(len(host.live) for host in model.hosts.values())
        if copies + loading >= hosts_wanted(demand, self._config.adapter_spread):
            self._waiting.pop(name, None)
            return
        first = not copies and not loading
        now_ns = self._timers.now_ns
        since_ns = self._waiting.get(name, now_ns)
        if self._load(name, offers, turn=first and now_ns - since_ns >= milliseconds(ADAPTER_TURN_MS)):
            self._waiting.pop(name, None)
            return
        if first and model.queue and not model.hosts and all(host.failed(name, now_ns) for host in offers.values()):
            self._waiting.pop(name, None)
            error = self._cannot(name, offers)
            for request in model.queue.items():
                self.give_up(request, error)
            return
        if model.queue:
            self._waiting.setdefault(name, now_ns)
            self._look_later()

    def _load(self, name: str, offers: dict[str, AdapterHost], *, turn: bool) -> bool:
        """Have a host load an adapter, or make a place for it first. Returns whether a load has begun."""
        now_ns, places = self._timers.now_ns, self._config.adapters_per_host
        hosts = [
            host for host in offers.values() if host.job is None and host.usable(name, now_ns) and name not in host.used
        ]
        free = [host for host in hosts if len(host.used) < places]
        if free:
            self._begin(min(free, key=lambda host: (host.ratio, len(host.used), host.name)), name, load=True)
            return True
        if any(host.room_for == name for host in offers.values()):
            return False
        hosts = [host for host in hosts if not host.leaving]
        idle = [(host.used[victim], host.name, host, victim) for host in hosts if (victim := host.idle()) is not None]
        if idle:
            _, _, host, victim = min(idle, key=lambda one: one[:2])
            self._unload(host, victim, wanted=name)
        elif turn:
            since_ns = now_ns - milliseconds(ADAPTER_TURN_MS)
            oldest = [(host.loaded_ns[one], host.name, host, one) for host in hosts if (one := host.oldest(since_ns))]
            if oldest:
                _, _, host, victim = min(oldest, key=lambda one: one[:2])
                self._hold_back(host, victim, name)
                self._journal.note("adapter_gives_way", worker=host.name, model=victim, wanted=name)
                self._unload_leaving(host)
        return False

    def _unload(self, host: AdapterHost, name: str, wanted: str = "") -> None:
        self._hold_back(host, name, wanted)
        self._begin(host, name, load=False)

    def _hold_back(self, host: AdapterHost, name: str, wanted: str) -> None:
        host.leave(name, wanted)
        self._registry.refresh(host.worker)

    def _release(self, host: AdapterHost) -> None:
        if host.leaving:
            host.stay()
            self._registry.refresh(host.worker)
            self.fill(host.worker)

    def _unload_leaving(self, host: AdapterHost) -> None:
        """Unload what is to go, once its last request has ended."""
        hosting = host.worker.hosts.get(host.leaving)
        if hosting is None or host.leaving not in host.bases:
            self._release(host)
        elif not hosting.live:
            self._begin(host, host.leaving, load=False)

    # ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, host: AdapterHost, name: str, *, load: bool) -> None:
        """Ask a worker. The path is its own: it is asked by the name that it has offered."""
        if self.instance < 0:
            # Drawn late, so that a controller without adapters draws what it drew before there were any.
            self.instance = self._rng.getrandbits(63)
        now_ns = self._timers.now_ns
        job = host.job = Job(name, next(self._numbers), now_ns, load=load)
        due_ns = now_ns + milliseconds(ADAPTER_LOAD_MS)
        job.timer = self._timers.at(due_ns, lambda _: self._late(host, job))
        call = OperateRequest(call="load_adapter" if load else "unload_adapter", arguments={"name": name})
        envelope = Dispatch(
            client=0,
            instance=self.instance,
            request=job.number,
            attempt=0,
            operation="operate",
            model=host.bases[name],
            deadline_ms=ADAPTER_LOAD_MS,
        )
        host.worker.dispatched += 1
        self._outbox.send(host.worker.routing_id, (codec.pack_envelope(envelope), codec.encode(call)))
        self._journal.note("adapter_asked", worker=host.name, model=name, call=call.call)

    def _proceed(self, host: AdapterHost) -> None:
        """A call is done when its worker has ended it, and announces what came of it."""
        job = host.job
        if job is None or not job.ended or (job.name in host.worker.hosts) is not job.load:
            return
        if job.load:
            host.measured(self._timers.now_ns - job.began_ns)
        host.failures.pop(job.name, None)
        self._over(host, job)
        told = {"worker": host.name, "model": job.name, "took_ms": (self._timers.now_ns - job.began_ns) // 1_000_000}
        if job.load:
            self._journal.note("adapter_loaded", **told)
        else:
            self._journal.note("adapter_unloaded", **told)

    def _late(self, host: AdapterHost, job: Job) -> None:
        """A call is not done in time. Until the worker has ended it nothing else is asked of it."""
        job.timer, job.late = None, True
        if not job.ended:
            abort = Abort(instance=self.instance, attempts=[(job.number, 0)])
            self._outbox.send(host.worker.routing_id, codec.pack(abort))
        self._failed(host, job, f"not done within {ADAPTER_LOAD_MS} ms")

    def _failed(self, host: AdapterHost, job: Job, why: str) -> None:
        host.fail(job.name, self._timers.now_ns)
        self._journal.note("adapter_failed", worker=host.name, model=job.name, load=job.load, why=why)
        self._dirty[job.name] = None
        if job.ended:
            self._over(host, job)

    def _over(self, host: AdapterHost, job: Job) -> None:
        """The worker is free for another call."""
        self._timers.cancel(job.timer)
        host.job = None
        if not job.load:
            self._release(host)
        self._dirty[job.name] = None
        self._dirty.update(dict.fromkeys(self._waiting))

    # ── in time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _look_later(self) -> None:
        if self._look is None:
            due_ns = self._timers.now_ns + milliseconds(ADAPTER_LOOK_MS)
            self._look = self._timers.at(due_ns, lambda now_ns: self._look_around(now_ns))

    def _look_around(self, now_ns: int) -> None:
        """Unload what is idle, and see to what waits. Costs O(loaded adapters + waiting names)."""
        self._look = None
        self._dirty.update(dict.fromkeys(self._waiting))
        idle_ns = now_ns - milliseconds(self._config.adapter_idle_ms)
        again = bool(self._waiting)
        for host in self._hosts.values() if self._config.adapters_per_host else ():
            host.note_running(now_ns)
            again = again or bool(host.used)
            if host.job is None and host.worker.taking:
                if host.leaving:
                    self._unload_leaving(host)
                elif (name := host.idle()) is not None and host.used[name] <= idle_ns and host.may_try(name, now_ns):
                    self._unload(host, name)
        if again:
            self._look_later()

    # ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _withdraw(self, host: AdapterHost, name: str) -> None:
        """A host offers a name no more."""
        offers = self._offers.get(name, {})
        offers.pop(host.name, None)
        if not offers:
            self._offers.pop(name, None)
            self._waiting.pop(name, None)
        self._dirty[name] = None
        host.failures.pop(name, None)

    def _cannot(self, name: str, offers: dict[str, AdapterHost]) -> NoWorkerError:
        return NoWorkerError(
            f"adapter {name!r} could not be loaded at any of {len(offers)} workers that offer it",
            model=name,
            workers=len(offers),
        )
