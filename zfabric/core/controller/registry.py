"""Who is there: clients, workers, models, and which worker hosts which model."""

from __future__ import annotations

import itertools
import random

from zfabric.core.controller.candidates import CANDIDATES_UNORDERED_MAX, Candidates
from zfabric.core.controller.directives import Directives
from zfabric.core.controller.fair_queue import FairQueue
from zfabric.core.controller.hosting import Alias, Demand, Hosting, Model, Supply
from zfabric.core.controller.names import Names
from zfabric.core.controller.peers import ClientPeer, Key, Request, WorkerPeer
from zfabric.core.controller.placement import Placement
from zfabric.limits import ALIASES_REMEMBERED_MAX
from zfabric.wire.messages import ModelInfo


class Registry:
    """Clients by instance, workers by name, models by all their names. Keeps supplies in step with hosts and free slots.

    Attributes:
        live: Every attempt in a worker's hands.
        changed: Models that gained or lost a host, or a host that takes requests: see `Queues.settle`.
        held: Names that a hosted model has now, and had not before.
        directives: What operators have ordered.
        placement: Where prompts are cached.
        revision: A number that changes with who is there, what workers announce, their slots, and whether they take requests.
    """

    __slots__ = (
        "_aliases", "_names", "_rng", "_turns", "changed", "clients", "directives", "held", "live", "models", "placement",
        "revision", "workers",
    )  # fmt: skip

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names: Names[Model] = Names()
        self._aliases = itertools.count(1)
        self._turns = itertools.count(1)
        self.clients: dict[int, ClientPeer] = {}
        self.workers: dict[str, WorkerPeer] = {}
        self.models: dict[str, Model] = {}
        self.live: dict[Key, Request] = {}
        self.changed: dict[Model, None] = {}
        self.held: dict[str, None] = {}
        self.directives = Directives()
        self.placement = Placement()
        self.revision = 0

    # ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, name: str) -> Model | None:
        """The model that a name stands for now, see `names`."""
        return self._names.find(name)

    def model(self, name: str) -> Model:
        """The model of a name, made if unknown."""
        found = self.models.get(name)
        if found is None:
            found = self.models[name] = Model(name, FairQueue(self._turns))
            found.queue.weight = self.directives.weights.get(name, 1)
            self._names.put(name, found, held=False)
        return found

    def supply(self, model: Model, demand: Demand) -> Supply:
        """Who can serve a demand of a model."""
        found = model.supplies.get(demand)
        if found is None:
            found = model.supplies[demand] = Supply()
        return found

    def candidates(self, supply: Supply) -> Candidates:
        """Who can take a request of a supply now."""
        return supply.ask(self._rng)

    def forget(self, model: Model) -> None:
        """Remove a model that nobody hosts."""
        self.models.pop(model.name, None)
        self.changed.pop(model, None)
        for name in (model.name, *model.aliases):
            self._names.discard(name, model)

    def sweep_aliases(self, model: Model) -> bool:
        """Take away aliases that nobody has announced since the last look. Returns whether another look is needed."""
        again = False
        for name in list(model.unheld):
            alias = model.aliases[name]
            if alias.stale:
                self._forget_alias(model, name)
            else:
                alias.stale = again = True
        return again

    def _forget_alias(self, model: Model, name: str) -> None:
        del model.aliases[name]
        model.unheld.pop(name, None)
        self._names.discard(name, model)

    def _announce_aliases(self, hosting: Hosting, former: list[str], aliases: list[str]) -> None:
        """Set a host's aliases. One that it drops on purpose, and nobody else announces, is gone at once."""
        model = hosting.model
        for name in former:
            alias = model.aliases.get(name)
            if alias is not None and name not in aliases:
                alias.holders.pop(hosting.name, None)
                if not alias.holders:
                    self._forget_alias(model, name)
        for name in aliases:
            if name == model.name:
                continue
            alias = model.aliases.get(name)
            if alias is None:
                alias = model.aliases[name] = Alias(next(self._aliases))
            if not alias.holders:
                model.unheld.pop(name, None)
                alias.stale = False
                self._hold(name, model, alias.order)
            alias.holders[hosting.name] = None

    def _hold(self, name: str, model: Model, order: int = 0) -> None:
        self._names.put(name, model, held=True, order=order)
        self.held[name] = None

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def announce(self, worker: WorkerPeer, infos: list[ModelInfo]) -> None:
        """Set the models of a worker. What runs there goes on, also of a model that it serves no more."""
        names = {info.name for info in infos}
        for name in [name for name in worker.hosts if name not in names]:
            self.withdraw(worker, name, lost=False)
        self.workers[worker.name] = worker
        self.revision += 1
        gained = False
        for info in infos:
            hosting = worker.hosts.get(info.name)
            if hosting is None:
                gained = True
                hosting = self._host(worker, info)
                self._announce_aliases(hosting, [], info.aliases)
            else:
                former, before = hosting.info.aliases, hosting.demands
                hosting.announced(info)
                self._announce_aliases(hosting, former, info.aliases)
                for demand in before:
                    if demand not in hosting.demands:
                        hosting.model.supplies[demand].discard(hosting, lost=False)
            for demand in hosting.demands:
                self.supply(hosting.model, demand).put(hosting)
            self.changed[hosting.model] = None
        if gained:
            self._rebind(worker)
        self.refresh(worker)

    def withdraw(self, worker: WorkerPeer, name: str, *, lost: bool = True) -> None:
        """Take one model away from a worker, which was lost, or serves it no more."""
        hosting = worker.hosts.pop(name)
        model = hosting.model
        self.revision += 1
        self.placement.forget(hosting)
        for demand in hosting.demands:
            model.supplies[demand].discard(hosting, lost=lost)
        del model.hosts[worker.name]
        if not model.hosts:
            self._names.put(model.name, model, held=False)
        for alias_name in hosting.info.aliases:
            alias = model.aliases.get(alias_name)
            if alias is not None and worker.name in alias.holders:
                del alias.holders[worker.name]
                if not alias.holders:
                    model.unheld[alias_name] = None
                    self._names.put(alias_name, model, held=False, order=alias.order)
        while len(model.unheld) > ALIASES_REMEMBERED_MAX:
            self._forget_alias(model, next(iter(model.unheld)))
        self.changed[model] = None

    def remove(self, worker: WorkerPeer) -> None:
        """A worker is gone, which has no models any more."""
        self.workers.pop(worker.name, None)
        self.revision += 1

    def _host(self, worker: WorkerPeer, info: ModelInfo) -> Hosting:
        """A worker serves a model that it did not serve before."""
        model = self.model(info.name)
        hosting = Hosting(worker, model, info)
        if not model.hosts:
            self._hold(model.name, model)
        worker.hosts[model.name] = model.hosts[worker.name] = hosting
        return hosting

    def _rebind(self, worker: WorkerPeer) -> None:
        """Count what a worker still runs of a model that it serves again."""
        for request in worker.live.values():
            hosting = worker.hosts.get(request.model.name) if request.model is not None else None
            if hosting is not None and request.host is not hosting and request.key not in worker.aside:
                request.host = hosting
                hosting.live.add(request.key)

    # ── what runs where ─────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self, worker: WorkerPeer) -> None:
        """Bring everything that depends on a worker's load and state up to date."""
        for hosting in worker.hosts.values():
            taking = hosting.taking
            if taking is not hosting.taken:
                hosting.taken = taking
                self.revision += 1
                self.changed[hosting.model] = None
                for demand in hosting.demands:
                    hosting.model.supplies[demand].put(hosting)
        self._fit(worker)

    def moved(self, worker: WorkerPeer, host: Hosting | None) -> None:
        """One request came to a worker or left it, of `host`'s model. The other models are looked at only where it
        matters to them: when the worker became full or free, and where candidates are kept in order."""
        if (worker.free > 0) is not worker.open:
            self._fit(worker)
            return
        worker.line.length = worker.length
        if len(self.workers) <= CANDIDATES_UNORDERED_MAX:
            return
        # A request may outlive its model at this worker.
        if host is not None and worker.hosts.get(host.model.name) is host:
            host.refresh(self._rng)
        if len(worker.hosts) > 1:
            for other in worker.hosts.values():
                if other is not host:
                    for candidates in other.kept:
                        candidates.changed(other, self._rng)

    def _fit(self, worker: WorkerPeer) -> None:
        """Bring the candidacies of all models of a worker up to date."""
        worker.line.length = worker.length
        worker.open = worker.free > 0
        if len(self.workers) > CANDIDATES_UNORDERED_MAX:
            for hosting in worker.hosts.values():
                hosting.refresh(self._rng)
