"""A flight recording as a run: its workers, its requests at their times, and what was lost, under the simulator's promises.

What a recording does not tell (how a network delays, which of two workers a policy draws) comes from a seed, so that one
incident is as many tests as there are seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.dispatch import BUILT_IN
from zfabric.errors import ConfigurationError
from zfabric.limits import PRIORITY_MAX
from zfabric.recording.arrivals import RecordedRequest, requests_of
from zfabric.recording.reader import Event, read_recordings
from zfabric.testing.apps import SimApp
from zfabric.testing.catalogue import ALL, PARAMETERS, EngineSpec, Habits
from zfabric.testing.clients import SimClient
from zfabric.testing.cluster import Cluster, run_cluster
from zfabric.testing.records import Wish
from zfabric.testing.reports import ClusterOptions, Report
from zfabric.testing.workers import SimWorker
from zfabric.testing.world import MILLISECOND, World
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo

#: What simulated engines can do; anything else that was asked for is simulated as the shortest of them.
_OPERATIONS: Final[dict[str, Operation]] = {"generate": "generate", "embed": "embed"}
#: Tokens of a simulated answer at most: longer ones have slower steps.
_TOKENS_MAX: Final = 900
#: Time that peers have to come, before the first request.
_OPENING_MS: Final = 500.0
#: How long a controller takes to say goodbye.
_GOODBYE_MS: Final = 30.0
#: How long a drained worker lets requests finish.
_DRAIN_MS: Final = 5_000


@dataclass
class RecordedWorker:
    """A worker of a recording.

    Attributes:
        name, models, slots, speed: As it registered.
        there: Whether it was registered before the recording began.
    """

    name: str
    models: list[str]
    slots: int
    speed: float
    there: bool


@dataclass
class Incident:
    """What a recording says that a run needs.

    Attributes:
        begin_ns, end_ns: Of its first and last event, in nanoseconds since 1970.
        policy: How the controller chose.
        workers: All that were registered at any time.
        requests: Those whose submission was recorded.
        events: All of the controller's.
    """

    begin_ns: int
    end_ns: int
    policy: str
    workers: list[RecordedWorker]
    requests: list[RecordedRequest]
    events: list[Event] = field(repr=False)

    @property
    def step_ms(self) -> float:
        """How long engines took for a token: the median where workers recorded their tokens, else the simulator's own pace."""
        paces = [request.running_s * 1_000 / request.units for request in self.requests if request.units]
        longest_ms = max((request.running_s * 1_000 for request in self.requests), default=0.0)
        return max(statistics.median(paces) if paces else 10.0, longest_ms / _TOKENS_MAX, 1.0)


def read_incident(files: Sequence[Path]) -> Incident:
    """What recordings of a controller and, if there are some, of its workers say.

    Raises:
        ConfigurationError: They cannot be read, or no controller's is among them, or nobody was there.
    """
    events = read_recordings(files).events
    seen = [event for event in events if event.of == "controller"]
    workers = _workers_of(seen)
    if not workers:
        raise ConfigurationError(f"no worker was registered in {', '.join(map(str, files))}: nothing can be simulated")
    policies = [event.fields["settings"]["policy"] for event in seen if event.name == "config"]
    policy = policies[-1] if policies and policies[-1] in BUILT_IN else BUILT_IN[0]
    return Incident(seen[0].unix_ns, seen[-1].unix_ns, policy, workers, requests_of(events), seen)


def simulate_recording(files: Sequence[Path], seed: int = 0) -> Report:
    """Run what a recording tells.

    Args:
        files: Recordings of one controller and of its workers.
        seed: Of all that they do not tell.

    Raises:
        ConfigurationError: As `read_incident`.
        Violation: A promise was broken.

    Example:
        ``assert simulate_recording([Path("incident.rec")]).outcomes["done"] == 12``
    """
    incident = read_incident(files)
    given = " ".join(f"--recording {file}" for file in files)
    return run_cluster(
        lambda world: IncidentCluster(world, seed, incident),
        seed,
        tight=False,
        again=f"python -m zfabric.testing --seed {seed} {given}",
    )


class IncidentCluster(Cluster):
    """The parts of a run that a recording gives."""

    def __init__(self, world: World, seed: int, incident: Incident) -> None:
        self.incident = incident
        self.begin_ms = world.now_ns / MILLISECOND
        until_ms = int(self._after_ms(incident.end_ns) + 1_000)
        super().__init__(world, seed, ClusterOptions(fault_ms=until_ms, operators=False, versions=False))

    def _after_ms(self, unix_ns: int) -> float:
        """From the run's begin to a moment of the recording."""
        return _OPENING_MS + (unix_ns - self.incident.begin_ns) / MILLISECOND

    def _draw_traits(self, seed: int) -> None:
        served = {tuple(worker.models) for worker in self.incident.workers}
        self.uniform = len(served) == 1 and len(next(iter(served))) == 1
        self.sound = True
        self.keyed = self.tight = self.crowded = False

    def _config(self, clients: int) -> BrokerConfig:
        return BrokerConfig(policy=self.incident.policy, stall_ms=4_000)

    def _make_workers(self) -> list[SimWorker]:
        made = []
        for worker in self.incident.workers:
            models = [
                ModelInfo(name=name, capabilities=[*ALL], parameters=["seed", *PARAMETERS]) for name in worker.models
            ]
            spec = EngineSpec(models=models, step_ms=self.incident.step_ms)
            habits = Habits(slots=max(1, worker.slots), speed=worker.speed, beats=True, stream_interval=1)
            simulated = SimWorker(self.world, self.network, worker.name, habits, [spec])
            if not worker.there:
                simulated.die()
            made.append(simulated)
        return made

    def _make_clients(self, count: int) -> list[SimClient | SimApp]:
        self._labels = list(dict.fromkeys(request.client for request in self.incident.requests)) or ["client"]
        return [SimApp(self.world, self.network, number) for number in range(len(self._labels))]

    def _plan_outsiders(self) -> None:
        """Nobody but those of the recording is there."""

    def _plan_requests(self) -> None:
        for number, request in enumerate(self.incident.requests, start=1):
            client = self.clients[self._labels.index(request.client)]
            self._submit_after(self._after_ms(request.submitted_ns), client, self._wish(number, request))

    def _wish(self, number: int, request: RecordedRequest) -> Wish:
        tokens = request.units or round(request.running_s * 1_000 / self.incident.step_ms)
        cancelled = request.outcome == "cancelled"
        taken_ms = max(1.0, (request.ended_ns - request.submitted_ns) / MILLISECOND)
        return Wish(
            number=number,
            operation=_OPERATIONS.get(request.operation, "count_tokens"),
            model=request.model,
            count=min(max(1, tokens), _TOKENS_MAX) if not cancelled else _TOKENS_MAX,
            priority=max(-PRIORITY_MAX, min(request.priority, PRIORITY_MAX)),
            deadline_ms=request.deadline_ms,
            cancel_after_ms=taken_ms if cancelled else None,
        )

    def _plan_faults(self) -> None:
        self._actors = {worker.name: worker for worker in self.workers}
        registered: set[str] = set()
        for position, event in enumerate(self.incident.events):
            at_ms = self._after_ms(event.unix_ns)
            name = event.fields.get("worker", "")
            if event.name == "started" and position:
                self._restart(self.incident.events[position - 1], at_ms)
            elif event.name == "drains":
                self._at(at_ms, "controller drains", self.controllers[0].drain)
            elif event.name == "client_lost":
                self._at(at_ms, "client link cut", partial(self._cut_client, event.fields["client"]))
            elif name not in self._actors:
                continue
            elif event.name == "worker_registered":
                # The first one is its start; later ones follow a loss, after which it is started if it is not there.
                delay_ms = at_ms if name in registered else at_ms - _OPENING_MS
                registered.add(name)
                self.world.after(max(0.0, delay_ms), lambda name=name: self._actors[name].start())  # type: ignore[misc]
            elif event.name == "worker_lost":
                self._lose(name, event, self.incident.events[position:])
            elif event.name == "worker_draining":
                self._at(at_ms, "worker drained", partial(self._drain, name))
            elif event.name == "engine_stalled":
                self._at(at_ms - event.fields["silent_ms"], "engine hung", partial(self._hang, name))

    def _restart(self, last: Event, started_ms: float) -> None:
        """A controller that had not said that it stops was killed, between the last that was heard of it and its start."""
        at_ms = self._after_ms(last.unix_ns)
        if last.name == "stopped":
            self._at(at_ms, "controller leaves", self.controllers[0].leave)
        else:
            at_ms = (at_ms + started_ms) / 2
            self._at(at_ms, "controller killed", self.controllers[0].die)
        # One that says goodbye needs a moment for it.
        self.world.after(max(started_ms, at_ms + _GOODBYE_MS), self.controllers[0].start)

    def _lose(self, name: str, event: Event, following: Sequence[Event]) -> None:
        """A worker that comes back with what it had lost its connection, and no more; any other died."""
        back = (one for one in following if one.name == "worker_registered" and one.fields["worker"] == name)
        again = next(back, None)
        cut = again is not None and bool(again.fields["carried"])
        busy = event.fields["in_flight"] > 0
        kind = "worker link cut" if cut else "worker killed"

        def lose() -> None:
            worker = self._actor(name, busy=busy)
            if cut:
                self.faults.cut(worker)
            else:
                worker.die()

        self._at(self._after_ms(event.unix_ns), kind, lose)

    def _actor(self, name: str, *, busy: bool) -> SimWorker:
        """Who plays a worker of the recording. A policy may have given the requests of one that was busy to another that
        serves the same: then the two change places."""
        worker = self._actors[name]
        if busy and not _jobs(worker):
            served = worker.specs[0].models
            others = [key for key, other in self._actors.items() if other.specs[0].models == served and _jobs(other)]
            if others:
                self._actors[name], self._actors[others[0]] = self._actors[others[0]], worker
        return self._actors[name]

    def _drain(self, name: str) -> None:
        self._actors[name].drain(_DRAIN_MS)

    def _hang(self, name: str) -> None:
        """Its engine stands still until all is healed."""
        for engine in self._actor(name, busy=True).engines:
            engine.hung_ns = self.world.now_ns

    def _cut_client(self, label: str) -> None:
        if label in self._labels:
            self.faults.cut(self.clients[self._labels.index(label)])

    def _at(self, at_ms: float, name: str, call: Callable[..., Any]) -> None:
        self.world.after(max(0.0, at_ms), self._fault(name, call))


def _jobs(worker: SimWorker) -> int:
    return sum(len(engine.jobs) for engine in worker.engines)


def _workers_of(events: Sequence[Event]) -> list[RecordedWorker]:
    found: dict[str, RecordedWorker] = {}
    for event in events:
        if event.name in ("worker_there", "worker_registered"):
            fields = event.fields
            there = event.name == "worker_there"
            worker = RecordedWorker(fields["worker"], list(fields["models"]), fields["slots"], fields["speed"], there)
            found.setdefault(worker.name, worker)
    return [worker for worker in found.values() if worker.models]
