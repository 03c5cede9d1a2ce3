"""A model, the workers that host it, and which of them can do what.

`Supply` answers for one demand: who suits it, who of them takes requests at all, who has a slot free now. There is one for
each demand that some host suits, or lately suited, or that was asked.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple, get_args

from zfabric.core.controller.candidates import CANDIDATES_UNORDERED_MAX, Candidates, Host
from zfabric.core.controller.fair_queue import FairQueue
from zfabric.core.timers import Timer
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo

if TYPE_CHECKING:
    from zfabric.core.controller.circuits import Circuit
    from zfabric.core.controller.peers import Request, WorkerPeer


class Demand(NamedTuple):
    """What a request asks of the worker that takes it: an operation, and to go on where another worker stopped."""

    operation: Operation
    resumes: bool


#: By operation: what a host demands nothing more for, and what it can do if it resumes.
_DEMANDS: Final[dict[str, tuple[Demand, Demand]]] = {
    operation: (Demand(operation, resumes=False), Demand(operation, resumes=True)) for operation in get_args(Operation)
}


def demand_of(operation: Operation, resume_from: int) -> Demand:
    """What a request asks of the worker that takes it."""
    return _DEMANDS[operation][resume_from > 0]


class Hosting(Host):
    """A model at a worker, with both ends.

    Attributes:
        demands: What it suits.
        kept: The candidates that are kept up to date with it: see `Supply.ask`.
        circuit: How its requests fail; None while none has since the last success.
        taken: Whether it took requests when its supplies were last brought up to date.
        leaving: It is to be unloaded (`adapters`), and gets no new requests.
    """

    __slots__ = ("circuit", "demands", "engine", "info", "kept", "leaving", "model", "taken", "worker")

    def __init__(self, worker: WorkerPeer, model: Model, info: ModelInfo) -> None:
        super().__init__(worker.name, worker.speed, info.slots, worker.line)
        self.worker = worker
        self.model = model
        self.kept: dict[Candidates, None] = {}
        self.taken = self.leaving = False
        self.circuit: Circuit | None = None
        self.announced(info)

    def announced(self, info: ModelInfo) -> None:
        """What its worker says of the model, at first and again later."""
        self.info = info
        self.slots = info.slots
        self.speed = self.worker.speed
        self.engine = self.worker.engine(info.engine)
        resumes = "resume" in info.capabilities
        self.demands = {
            demand: None
            for capability in info.capabilities
            for demand in _DEMANDS.get(capability, ())
            if resumes or not demand.resumes
        }

    @property
    def taking(self) -> bool:
        """Whether its worker takes requests for it at all, now or when others have ended."""
        return self.worker.taking and self.engine not in self.worker.hung

    @property
    def open(self) -> bool:
        """Whether a request of the model may go to the worker now."""
        return self.free and (self.circuit is None or self.circuit.admits(self))

    @property
    def free(self) -> bool:
        """Whether the worker has a slot for a request of the model, and takes it."""
        if self.leaving or self.worker.free <= 0 or not self.taking:
            return False
        return not self.slots or len(self.live) < self.slots

    def suits(self, demand: Demand) -> bool:
        """Whether it can do what is asked."""
        return demand in self.demands

    def refresh(self, rng: random.Random) -> None:
        """Be a candidate where it may be one now, and nowhere else."""
        if self.kept:
            is_open = self.open
            for candidates in self.kept:
                if is_open:
                    candidates.add(self, rng)
                else:
                    candidates.remove(self)


class Supply:
    """Who can serve one demand of a model.

    Attributes:
        hosts: Those that suit it, by worker.
        taking: Of those, the ones whose workers take requests.
        candidates: Of those, the ones that have a slot free.
        kept: Whether they are kept up to date with every request, since there are too many to look at; else they are as
            they were when they were last asked for.
        expected: The last host that suited it was lost, and may come back.
        untaken_ns, absent_ns: Since when no host takes requests, and since when none suits; None while one does.
        timer: Ends what waits, if that lasts.
    """

    __slots__ = ("absent_ns", "candidates", "expected", "hosts", "kept", "taking", "timer", "untaken_ns")

    def __init__(self) -> None:
        self.hosts: dict[str, Hosting] = {}
        self.taking: dict[str, Hosting] = {}
        self.candidates = Candidates()
        self.kept = False
        self.expected = False
        self.untaken_ns: int | None = None
        self.absent_ns: int | None = None
        self.timer: Timer | None = None

    def put(self, hosting: Hosting) -> None:
        """Bring a host that suits the demand up to date, but for whether it has a slot free."""
        self.hosts[hosting.name] = hosting
        if hosting.taken:
            self.taking[hosting.name] = hosting
        else:
            self.taking.pop(hosting.name, None)
        if self.kept:
            hosting.kept[self.candidates] = None

    def discard(self, hosting: Hosting, *, lost: bool) -> None:
        """A host suits the demand no more: it was lost with its worker, or has said so."""
        if self.hosts.pop(hosting.name, None) is not None:
            self.taking.pop(hosting.name, None)
            self.expected = lost
            self.candidates.remove(hosting)
            hosting.kept.pop(self.candidates, None)
            self._keep(kept=self.kept and self.many)

    def note(self, now_ns: int) -> None:
        """Note since when nobody suits the demand, and since when nobody takes requests of it."""
        if self.taking:
            self.untaken_ns = self.absent_ns = None
        else:
            self.untaken_ns = self.untaken_ns if self.untaken_ns is not None else now_ns
            if self.hosts:
                self.absent_ns = None
            elif self.absent_ns is None:
                self.absent_ns = now_ns

    @property
    def many(self) -> bool:
        """Whether there are more hosts than to look at for each request."""
        return len(self.hosts) > CANDIDATES_UNORDERED_MAX

    def ask(self, rng: random.Random) -> Candidates:
        """Who can take a request now.

        A few hosts are looked at when they are asked for, and cost nothing in between, however many models their workers
        have. Many are kept up to date from the first time on, and asking costs nothing.
        """
        if not self.kept:
            self._keep(kept=self.many)
            for hosting in self.hosts.values():
                if hosting.open:
                    self.candidates.add(hosting, rng)
                else:
                    self.candidates.remove(hosting)
        return self.candidates

    def _keep(self, *, kept: bool) -> None:
        if kept is not self.kept:
            self.kept = kept
            for hosting in self.hosts.values():
                if kept:
                    hosting.kept[self.candidates] = None
                else:
                    hosting.kept.pop(self.candidates, None)


class Alias:
    """A name that workers announced for a model.

    Attributes:
        order: When it was first announced, as a number that grows.
        holders: The workers that announce it now.
        stale: Whether it had no holder at the last look, and since.
    """

    __slots__ = ("holders", "order", "stale")

    def __init__(self, order: int) -> None:
        self.order = order
        self.holders: dict[str, None] = {}
        self.stale = False


class Model:
    """A model that some worker hosts or lately hosted, and the requests that wait for it.

    Attributes:
        asked: The waiting requests by the name that was asked for, which may be an alias.
        unheld: Its aliases that no worker announces now.
        out: Its hosts whose circuits are open or half open, by worker, the longest out first.
        forget: Ends its waiting requests and removes it, some time after its last host left.
        sweep: Takes aliases away that nobody announces any more.
    """

    __slots__ = ("aliases", "asked", "forget", "hosts", "name", "out", "queue", "supplies", "sweep", "unheld")

    def __init__(self, name: str, queue: FairQueue[Request] | None = None) -> None:
        self.name = name
        self.queue: FairQueue[Request] = FairQueue() if queue is None else queue
        self.hosts: dict[str, Hosting] = {}
        self.out: dict[str, Hosting] = {}
        self.supplies: dict[Demand, Supply] = {}
        self.aliases: dict[str, Alias] = {}
        self.unheld: dict[str, None] = {}
        self.asked: dict[str, dict[Request, None]] = {}
        self.forget: Timer | None = None
        self.sweep: Timer | None = None

    def __repr__(self) -> str:
        return f"<Model {self.name} hosts={len(self.hosts)} queued={len(self.queue)}>"
