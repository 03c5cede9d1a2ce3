"""Requests that wait: in whose queue, for which worker, and for how long.

Rule 1: no request waits while a worker that suits it has a slot free, unless an operator has its model paused, or the worker's
        requests failed one after the other (`circuits`): then for CIRCUIT_OPEN_MS_MAX and a little at the most, until it is
        tried again with one request at a time.
Rule 2: no request waits without end. What no host can do ends at once, unless a host that could was lost and may come back;
        what no host takes, since all of them drain or hang, ends after UNTAKEN_MS, and what an operator has wait after a time
        that the operator has set. An adapter is waited for as long as a worker may load it. A model without hosts is
        remembered for MODEL_MEMORY_MS; then its requests end. One that has a rule for its replicas may have none, and its
        requests wait for the first, each as long as the rule says. While the controller is new everybody may be on the way,
        and nothing ends.
Rule 3: a request waits for the model that its name stood for. If nobody hosts that any more, it moves to the model that the
        name stands for now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.figures import Figures
from zfabric.core.controller.hosting import Demand, Hosting, Model, Supply
from zfabric.core.controller.peers import Request, WorkerPeer, WorkerState
from zfabric.core.controller.registry import Registry
from zfabric.core.timers import Timers
from zfabric.errors import FabricError, NoWorkerError, UnsupportedOperationError, WorkerLostError
from zfabric.ids import milliseconds
from zfabric.limits import (
    ADAPTER_LOOK_MS,
    COMPARED_MAX,
    MODEL_MEMORY_MS,
    MODELS_REMEMBERED_MAX,
    TURNS_BY_AGE,
    UNTAKEN_MS,
)


class Queues:
    """All requests that wait.

    Args:
        give_up: Ends a request that waits in vain.
        offer: Has a model serve a request, now or later: sends it to a worker, or calls `add`.
        fit: Takes hosts of a model back whose circuits are open, where too many are now.

    Attributes:
        recovering: Whether the controller is new, and workers may still be on their way back to it.
        awaited: What a model is waited for that no worker takes requests of, in words: an adapter that is to be loaded. "" for
            nothing.
        queued: Told of models that a request came to wait for.
    """

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        timers: Timers,
        figures: Figures,
        give_up: Callable[[Request, FabricError], None],
        offer: Callable[[Request, Model], None],
        fit: Callable[[Model], None],
    ) -> None:
        self._config = config
        self._registry = registry
        self._timers = timers
        self._figures = figures
        self._give_up = give_up
        self._offer = offer
        self._fit = fit
        #: Models for which requests wait, by name, the longest not served first; and by the names that were asked for.
        self._waiting: OrderedDict[str, Model] = OrderedDict()
        self._asked: dict[str, dict[Model, None]] = {}
        #: Models that nobody hosts, roughly the longest first.
        self._unhosted: OrderedDict[Model, None] = OrderedDict()
        self._newly_unhosted = 0
        self.recovering = False
        self.awaited: Callable[[str], str] = lambda name: ""
        self.queued: Callable[[str], None] = lambda name: None

    # ── in and out ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, model: Model, request: Request) -> None:
        """Have a request wait for a model."""
        request.model = model
        model.queue.push(request)
        model.asked.setdefault(request.asked, {})[request] = None
        self._asked.setdefault(request.asked, {})[model] = None
        self._waiting[model.name] = model
        self._figures.queued_bytes += request.size
        if not model.hosts:
            self._expect_host(model)
        supply = self._registry.supply(model, request.demand)
        self.queued(model.name)
        if supply.timer is None and (not supply.taking or model.name in self._registry.directives.paused):
            self._review(model, request.demand, supply)

    def remove(self, request: Request) -> None:
        """Take a request that waits out of its queue."""
        model = request.model
        assert model is not None
        model.queue.remove(request)
        self._figures.queued_bytes -= request.size
        asked = model.asked[request.asked]
        del asked[request]
        if not asked:
            del model.asked[request.asked]
            models = self._asked[request.asked]
            del models[model]
            if not models:
                del self._asked[request.asked]
            if not model.asked:
                del self._waiting[model.name]

    def wanting(self, worker: WorkerPeer) -> int:
        """How many clients wait for a slot of a worker's models. Costs O(its models)."""
        if worker.state is not WorkerState.READY:
            return 0
        queues = [host.model.queue for host in worker.hosts.values()]
        return sum([queue.lines for queue in queues if queue])

    def take(self, worker: WorkerPeer) -> tuple[Request, Hosting] | None:
        """Take out what a worker with a free slot gets next; None where nothing waits that suits it."""
        found = self._next_for(worker) if self._waiting and worker.free > 0 else None
        if found is not None:
            request, host = found
            worker.filled += 1
            host.model.queue.serve(request)
            self.remove(request)
            self._served(host)
        return found

    def _next_for(self, worker: WorkerPeer) -> tuple[Request, Hosting] | None:
        """By priority, then by turns of what the worker can do, then by turns of clients. Now and then it is what has waited
        longest, so that priorities make nobody wait for ever.

        Of a worker with a great many models for which requests wait, those are compared that were served the longest ago.
        """
        by_age = worker.filled % TURNS_BY_AGE == TURNS_BY_AGE - 1
        paused = self._registry.directives.paused
        found: tuple[Request, Hosting] | None = None
        least: tuple[int, int] | None = None
        compared = 0
        for name in self._waiting if len(self._waiting) < len(worker.hosts) else worker.hosts:
            host = worker.hosts.get(name)
            if host is None or not host.model.asked or not host.open or name in paused:
                continue
            for demand in host.model.queue.demands:
                if demand not in host.demands:
                    continue
                compared += 1
                head = host.model.queue.oldest(demand) if by_age else host.model.queue.head(demand)
                if least is None or head.rank < least:
                    found, least = (head.item, host), head.rank
            if compared >= COMPARED_MAX:
                break
        return found

    def _served(self, host: Hosting) -> None:
        """It is the turn of other models now."""
        name, hosts = host.model.name, host.worker.hosts
        if len(hosts) > 1:
            hosts[name] = hosts.pop(name)
        if name in self._waiting:
            self._waiting.move_to_end(name)

    # ── hosts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def recovered(self) -> None:
        """Whoever was on the way back to a new controller is there now: what nobody can do ends."""
        self.recovering = False
        for model in self._waiting.values():
            self._registry.changed[model] = None
        self.settle()

    def settle(self) -> None:
        """Bring to rest what a change of hosts or names began: waiting requests move to whoever serves their name now,
        or end."""
        registry = self._registry
        while registry.changed or registry.held:
            held, registry.held = registry.held, {}
            changed, registry.changed = registry.changed, {}
            for name in held:
                for model in list(self._asked.get(name, ())):
                    if not model.hosts:
                        self._reroute(model, name)
            for model in changed:
                self._settle_model(model)
        if self._newly_unhosted:
            self._forget_most()

    def _settle_model(self, model: Model) -> None:
        if not model.hosts:
            for name in list(model.asked):
                self._reroute(model, name)
            self._expect_host(model)
        else:
            self._timers.cancel(model.forget)
            model.forget = None
            self._unhosted.pop(model, None)
            self._sweep_aliases(model)
        self.review(model)
        self._fit(model)

    def _reroute(self, model: Model, name: str) -> None:
        """Requests for a name whose model nobody hosts go to the model that it stands for now. Not those in mid-answer: only
        the model that began one can go on with it."""
        target = self._registry.find(name)
        if target is None or target is model or not target.hosts:
            return
        for request in list(model.asked.get(name, ())):
            if request.demand.resumes:
                continue
            self.remove(request)
            self._offer(request, target)

    def refusal(self, model: Model, demand: Demand, supply: Supply) -> FabricError | None:
        """Why a demand is not to be waited for any longer; None where it is."""
        now_ns = self._timers.now_ns
        supply.note(now_ns)
        pause = self._registry.directives.paused.get(model.name)
        if pause is not None and now_ns >= pause.until_ns:
            return NoWorkerError(
                f"model {model.name!r} is paused by operator {pause.by!r}", model=model.name, by=pause.by
            )
        if supply.taking or self.recovering:
            return None
        absent = not supply.hosts and bool(model.hosts)
        if absent and not supply.expected:
            return cannot_serve(model, demand)
        if not absent and model.name in self._registry.directives.scaled:
            # One is on its way, and each request waits for it for a time of its own.
            return None
        if now_ns < _due_ns(supply) or (not absent and self.awaited(model.name)):
            return None
        if absent:
            return cannot_serve(model, demand)
        return NoWorkerError(f"no worker of {model.name!r} takes requests", model=model.name, workers=len(supply.hosts))

    def _review(self, model: Model, demand: Demand, supply: Supply) -> None:
        """End what waits in vain, or come back when it is to be waited for no longer."""
        self._timers.cancel(supply.timer)
        supply.timer = None
        error = self.refusal(model, demand, supply)
        if error is not None:
            for request in model.queue.waiting(demand):
                self._give_up(request, error)
            return
        self._give_up_unstarted(model, demand, supply)
        if demand in model.queue.demands:
            due_ns = self._due_ns(model, demand, supply)
            if due_ns is not None:
                supply.timer = self._timers.judge_at(due_ns, lambda _: self._review(model, demand, supply))

    def _unstarted_ns(self, model: Model, supply: Supply) -> int | None:
        """How long a request waits for the first replica of a model that has a rule for them; None where that is not what it
        waits for."""
        if supply.taking or self.recovering or (model.hosts and not supply.hosts):
            return None
        return self._registry.directives.scaled.get(model.name)

    def _give_up_unstarted(self, model: Model, demand: Demand, supply: Supply) -> None:
        """End what has waited too long for a replica to be started."""
        wait_ns = self._unstarted_ns(model, supply)
        while wait_ns is not None and demand in model.queue.demands:
            request = model.queue.oldest(demand).item
            if request.accepted_ns + wait_ns > self._timers.now_ns:
                return
            text = f"no worker of {model.name!r} has come up within {wait_ns / 1e9:g} s, though its rule asks for one"
            self._give_up(request, NoWorkerError(text, model=model.name))

    def review(self, model: Model) -> None:
        """An operator has paused a model, or has it go on: what waits ends at another time."""
        for demand, supply in list(model.supplies.items()):
            self._review(model, demand, supply)

    def _due_ns(self, model: Model, demand: Demand, supply: Supply) -> int | None:
        """Until when what waits is waited for; None while somebody takes it sooner or later."""
        pause = self._registry.directives.paused.get(model.name)
        untaken = not supply.taking and not self.recovering
        wait_ns = self._unstarted_ns(model, supply)
        if wait_ns is not None:
            times = [model.queue.oldest(demand).item.accepted_ns + wait_ns]
        elif untaken:
            # What an adapter is loaded for is looked at again: nobody says when it is awaited in vain.
            due_ns, now_ns = _due_ns(supply), self._timers.now_ns
            times = [due_ns if due_ns > now_ns else now_ns + milliseconds(ADAPTER_LOOK_MS)]
        else:
            times = []
        return min([*times, pause.until_ns] if pause is not None else times, default=None)

    def _expect_host(self, model: Model) -> None:
        """Nobody hosts a model: wait for somebody, but not for ever."""

        def forget(now_ns: int) -> None:
            model.forget = None
            awaited = model.name in self._registry.directives.scaled or (model.asked and self.awaited(model.name))
            if self.recovering or awaited:
                self._expect_host(model)
                return
            for request in model.queue.items():
                self._give_up(request, NoWorkerError(f"no worker serves {model.name!r}", model=model.name))
            self._forget(model)

        if model.name in self._registry.directives.scaled:
            self._unhosted.pop(model, None)
        elif model.forget is None:
            self._unhosted[model] = None
            self._newly_unhosted += 1
            wait_ms = self._config.recovery_ms if self.recovering else MODEL_MEMORY_MS
            model.forget = self._timers.judge_at(self._timers.now_ns + milliseconds(wait_ms), forget)

    def _forget(self, model: Model) -> None:
        """Remove a model that nobody hosts and nothing waits for."""
        for timer in (model.forget, model.sweep, *(supply.timer for supply in model.supplies.values())):
            self._timers.cancel(timer)
        self._unhosted.pop(model, None)
        self._registry.forget(model)

    def _forget_most(self) -> None:
        """Remember no more models without hosts than may be: a worker can announce other names with each message. Those for which
        requests wait are as many as those at most."""
        # As many looks as there are new ones, twice: so a look costs whoever made them, and in the end finds one to forget.
        looks, self._newly_unhosted = 2 * self._newly_unhosted, 0
        for _ in range(min(looks, len(self._unhosted) - MODELS_REMEMBERED_MAX)):
            model = next(iter(self._unhosted))
            if model.asked:
                self._unhosted.move_to_end(model)
            else:
                self._forget(model)

    def ends_ns(self, model: Model, demand: Demand) -> int | None:
        """When what waits for a demand is given up, if nothing changes; None if that is not in sight."""
        timers = (model.supplies[demand].timer, model.forget)
        return min((timer.due_ns for timer in timers if timer is not None), default=None)

    def _sweep_aliases(self, model: Model) -> None:
        """Have aliases that nobody announces any more taken away after a time in which somebody may."""

        def sweep(now_ns: int) -> None:
            model.sweep = None
            if model.hosts and self._registry.sweep_aliases(model):
                self._sweep_aliases(model)

        if model.unheld and model.sweep is None:
            model.sweep = self._timers.judge_at(self._timers.now_ns + milliseconds(MODEL_MEMORY_MS), sweep)


def _due_ns(supply: Supply) -> int:
    """Until when somebody has to take requests of a demand that nobody takes now."""
    assert supply.untaken_ns is not None
    due_ns = supply.untaken_ns + milliseconds(UNTAKEN_MS)
    if supply.absent_ns is not None:
        due_ns = min(due_ns, supply.absent_ns + milliseconds(MODEL_MEMORY_MS))
    return due_ns


def cannot_serve(model: Model, demand: Demand) -> FabricError:
    """Nobody can do this with the model. What somebody began is not unsupported, even where nobody is left who could: the
    worker that was lost may come back with it."""
    if demand.resumes:
        return cannot_continue(model.name)
    return UnsupportedOperationError(
        f"model {model.name!r} does not support {demand.operation}", model=model.name, operation=demand.operation
    )


def cannot_continue(model: str) -> WorkerLostError:
    """Nobody can go on with an answer that another worker began."""
    return WorkerLostError(f"no worker of {model!r} can go on in mid-stream", model=model, resumable=False)
