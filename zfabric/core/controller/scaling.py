"""How many replicas of a model there should be, by what waits, what runs and how fast it goes.

The rule is that of the Kubernetes HorizontalPodAutoscaler
(https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/, "Algorithm details"), with three signals::

    slots   = (running + backlog) / (slots of a replica * busy)
    backlog = waiting * min(1, service time / catch_up_s)
    tokens  = tokens a second of all replicas / tokens_per_second
    queue   = ready * min(longest wait / queue_ms, 2), where somebody waits longer than queue_ms
    wanted  = ceil(max(slots, tokens, queue))

What is within a tenth of `ready`, the replicas that take requests now, leaves their number as it is. More are wanted at once;
fewer only when nothing has wanted as many for `settle_s` (its "stabilization window"). The last replica goes when nothing has
run or waited for `idle_s`, as KEDA's `cooldownPeriod` has it, and the first comes with the first request.

What waits is a backlog and no load: worked off within `catch_up_s`, it needs as many slots as its service time has shares of
that (Little's law). A wait says nothing of how much is missing, so it can no more than double what is there: those that it
asked for have to come up before they count.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated, Final, NamedTuple

from msgspec import Meta, Struct

from zfabric.core.controller.figures import Figures
from zfabric.core.controller.hosting import Model
from zfabric.core.controller.queues import Queues
from zfabric.core.controller.registry import Registry
from zfabric.core.timers import Timer, Timers
from zfabric.errors import ConfigurationError
from zfabric.ids import milliseconds
from zfabric.limits import NAME_LENGTH_MAX, SCALE_LOOK_MS, SCALE_TOLERANCE, WORKERS_MAX
from zfabric.wire.status import ScalingStatus

_QUEUE_RATIO_MAX: Final = 2.0
_Replicas = Annotated[int, Meta(ge=0, le=WORKERS_MAX)]
_Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class Rule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By what the number of a model's replicas is decided.

    Attributes:
        model: The model's own name.
        min: Replicas at least; 0 lets the last one go when nothing is asked.
        max: Replicas at most.
        busy: The share of a replica's slots that is to be in use.
        catch_up_s: Within which time what waits is to be worked off.
        queue_ms: How long a request may wait before more replicas are wanted.
        tokens_per_second: What one replica is to make; 0 does not look at that.
        settle_s: For how long fewer replicas have to do before there are fewer.
        idle_s: How long nothing may have run or waited before the last replica goes.
        wait_s: How long a request waits for the first replica at most, beside its own deadline.
    """

    model: Annotated[str, Meta(min_length=1, max_length=NAME_LENGTH_MAX)]
    max: _Replicas
    min: _Replicas = 1
    busy: Annotated[float, Meta(gt=0, le=1)] = 0.8
    queue_ms: Annotated[int, Meta(ge=1)] = 1_000
    catch_up_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    tokens_per_second: Annotated[float, Meta(ge=0)] = 0.0
    settle_s: _Seconds = 300.0
    idle_s: _Seconds = 300.0
    wait_s: _Seconds = 600.0

    def __post_init__(self) -> None:
        if self.max < max(1, self.min):
            raise ValueError(f"max is {self.max}, it must be at least 1 and at least min, which is {self.min}")


class Signals(NamedTuple):
    """What a model's load is now.

    Attributes:
        ready: Replicas that take requests.
        slots: Requests that one of them takes at a time; 0 if none has told.
        running, waiting: Requests.
        longest_wait_ms: Of those that wait.
        tokens_per_second: Of all replicas together.
        service_s: How long a request holds a slot, on average; 0 if none has ended.
    """

    ready: int
    slots: float
    running: int
    waiting: int
    longest_wait_ms: float = 0.0
    tokens_per_second: float = 0.0
    service_s: float = 0.0


class Scaler:
    """The number of one model's replicas over time.

    Args:
        rule: How it is decided. It may be replaced.

    Attributes:
        desired: The number now.

    Example:
        >>> scaler = Scaler(Rule(model="chat", min=0, max=4))
        >>> scaler.look(Signals(ready=1, slots=8, running=8, waiting=11), now_s=1.0)
        3
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.desired = rule.min
        self._slots = 0.0
        self._active_s = -math.inf
        self._began_s: float | None = None
        #: What was wanted within the last `settle_s`, falling: the first is the most.
        self._wanted: deque[tuple[float, int]] = deque()

    def look(self, signals: Signals, now_s: float) -> int:
        """The number of replicas from now on. Args: now_s: Not less than at the last look."""
        rule = self.rule
        if self._began_s is None:
            self._began_s = now_s
        if signals.slots > 0:
            self._slots = signals.slots
        if signals.running or signals.waiting:
            self._active_s = now_s
        wanted = self._want(signals)
        if now_s - self._began_s < rule.settle_s:
            # Whoever was here before the controller was wanted by the one before it.
            wanted = max(wanted, signals.ready)
        if now_s - self._active_s < rule.idle_s:
            wanted = max(1, wanted)
        wanted = min(max(wanted, rule.min), rule.max)
        while self._wanted and self._wanted[-1][1] <= wanted:
            self._wanted.pop()
        self._wanted.append((now_s, wanted))
        while now_s - self._wanted[0][0] > rule.settle_s:
            self._wanted.popleft()
        self.desired = min(max(self._wanted[0][1], rule.min), rule.max)
        return self.desired

    def _want(self, signals: Signals) -> int:
        rule, ready = self.rule, signals.ready
        if not self._slots:
            # The first one will tell how much it takes.
            return 1 if signals.waiting else 0
        backlog = signals.waiting * min(1.0, signals.service_s / rule.catch_up_s if signals.service_s else 1.0)
        shares = [(signals.running + backlog) / (self._slots * rule.busy)]
        if rule.tokens_per_second:
            shares.append(signals.tokens_per_second / rule.tokens_per_second)
        if signals.waiting and signals.longest_wait_ms > rule.queue_ms:
            shares.append(ready * min(signals.longest_wait_ms / rule.queue_ms, _QUEUE_RATIO_MAX))
        share = max(shares)
        if ready and abs(share / ready - 1) <= SCALE_TOLERANCE:
            return ready
        return math.ceil(share)


class Scaling:
    """The rules of a controller's models, and what they have decided.

    Args:
        queues: Told when requests for a model are to be waited for otherwise than before.
        figures: Tell how long requests take.
    """

    def __init__(self, registry: Registry, timers: Timers, queues: Queues, figures: Figures) -> None:
        self._registry = registry
        self._timers = timers
        self._queues = queues
        self._figures = figures
        self._scalers: dict[str, Scaler] = {}
        self._timer: Timer | None = None

    def set_rules(self, rules: list[Rule]) -> None:
        """Have these rules hold, and no others.

        Raises:
            ConfigurationError: Two are about one model.
        """
        names = {rule.model: rule for rule in rules}
        if len(names) < len(rules):
            twice = next(rule.model for rule in rules if names[rule.model] is not rule)
            raise ConfigurationError(f"model {twice!r} has two rules for its replicas", model=twice)
        former, self._scalers = self._scalers, {}
        for name, rule in names.items():
            scaler = self._scalers[name] = former.get(name) or Scaler(rule)
            scaler.rule = rule
        scaled = self._registry.directives.scaled
        scaled.clear()
        scaled |= {name: milliseconds(int(rule.wait_s * 1_000)) for name, rule in names.items()}
        for name in {*former, *names}:
            if (model := self._registry.models.get(name)) is not None:
                self._registry.changed[model] = None
        self._queues.settle()
        self._look(self._timers.now_ns)

    def rows(self) -> list[ScalingStatus]:
        """What was decided at the last look, and by what, as it is now; nothing while the controller is new and workers may be on
        their way back to it."""
        if self._queues.recovering:
            return []
        return [self._row(name, scaler) for name, scaler in sorted(self._scalers.items())]

    @property
    def desired(self) -> dict[str, int]:
        """The number of replicas by model; none while the controller is new."""
        if self._queues.recovering:
            return {}
        return {name: scaler.desired for name, scaler in self._scalers.items()}

    def _row(self, name: str, scaler: Scaler) -> ScalingStatus:
        signals = self._signals(name)
        return ScalingStatus(
            model=name,
            desired=scaler.desired,
            min=scaler.rule.min,
            max=scaler.rule.max,
            ready=signals.ready,
            running=signals.running,
            waiting=signals.waiting,
            longest_wait_s=signals.longest_wait_ms / 1_000,
            slots=signals.slots,
            tokens_per_second=signals.tokens_per_second,
            service_s=signals.service_s,
        )

    def _look(self, now_ns: int) -> None:
        if self._timer is not None:
            self._timers.cancel(self._timer)
        self._timer = None
        if not self._scalers:
            return
        for name, scaler in () if self._queues.recovering else self._scalers.items():
            scaler.look(self._signals(name), now_ns / 1e9)
        self._timer = self._timers.at(now_ns + milliseconds(SCALE_LOOK_MS), self._look)

    def _signals(self, name: str) -> Signals:
        model = self._registry.models.get(name)
        if model is None:
            return Signals(0, 0.0, 0, 0)
        hosts = [host for host in model.hosts.values() if host.taking]
        slots = sum(min(host.slots or host.worker.load.slots, host.worker.load.slots) for host in hosts)
        return Signals(
            ready=len(hosts),
            slots=slots / len(hosts) if hosts else 0.0,
            # Of what other controllers have there it is known how much, and not of which model.
            running=sum(
                host.in_flight + host.worker.load.elsewhere // len(host.worker.hosts) for host in model.hosts.values()
            ),
            waiting=len(model.queue),
            longest_wait_ms=self._longest_wait_ms(model),
            tokens_per_second=sum(host.worker.load.tokens_per_second for host in hosts),
            service_s=self._service_s(name),
        )

    def _service_s(self, name: str) -> float:
        """How long a request holds a slot, on average since the start."""
        found = self._figures.models.get(name)
        if found is None or not found.whole_time.count:
            return 0.0
        waited_ns = found.queue_time.total_ns / max(1, found.queue_time.count)
        return max(0.0, found.whole_time.total_ns / found.whole_time.count - waited_ns) / 1e9

    def _longest_wait_ms(self, model: Model) -> float:
        oldest = [model.queue.oldest(demand).item for demand in model.queue.demands]
        now_ns = self._timers.now_ns
        return max(((now_ns - request.accepted_ns) / 1e6 for request in oldest), default=0.0)
