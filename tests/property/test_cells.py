"""A cell under any sequence of messages: it is the sum of its workers, and owes its parent nothing in the end."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.levels import CELL, Levels
from zfabric.core.controller.hosting import demand_of
from zfabric.core.controller.peers import WorkerState
from zfabric.errors import WorkerDrainingError
from zfabric.testing.checkers import check_rest
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo

NAMES = ("a", "b", "c")
WORKERS = ("w0", "w1", "w2")
names = st.sampled_from(NAMES)
workers = st.sampled_from(WORKERS)
some = st.lists(st.sampled_from(["generate", "embed", "resume", "chat", "multimodal"]), unique=True, min_size=1)
models = st.lists(
    st.builds(
        ModelInfo,
        name=names,
        aliases=st.lists(st.sampled_from(["x", "y", *NAMES]), unique=True, max_size=2),
        context_length=st.sampled_from([0, 2_048, 4_096]),
        capabilities=some,
        parameters=st.one_of(st.none(), st.lists(st.sampled_from(["seed", "top_p", "stop"]), unique=True)),
        extra=st.one_of(st.none(), st.lists(st.sampled_from(["k", "l"]), unique=True)),
        dimensions=st.sampled_from([0, 8, 16]),
        slots=st.sampled_from([0, 0, 1]),
        details=st.dictionaries(st.sampled_from(["dtype", "device"]), st.sampled_from(["p", "q"])),
        loadable=st.lists(st.sampled_from(["l1", "l2"]), unique=True, max_size=1),
    ),
    unique_by=lambda info: info.name,
    max_size=3,
)


class CellMachine(RuleBasedStateMachine):
    """Three workers in a cell, a client of its own and one of its parent's, and a connection between the two controllers."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = Levels(queue_depth_max=8, circuit_failures=0)
        self.parent, self.cell = self.levels.parent, self.levels.cell
        self.parent.client("alice")
        self.cell.client("bob")
        self.asked: Counter[tuple[int, int]] = Counter()
        self.number = 1

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(worker=workers, models=models, slots=st.integers(0, 3))
    def announce(self, worker: str, models: list[ModelInfo], slots: int) -> None:
        self.cell.worker(worker, *models, slots=slots, again=worker in self.cell.broker.registry.workers)

    @rule(worker=workers, slots=st.integers(0, 3), draining=st.sampled_from([False, False, True]))
    def load(self, worker: str, slots: int, draining: bool) -> None:
        if worker in self.cell.broker.registry.workers:
            self.cell.load(worker, slots=slots, draining=draining)

    @rule(worker=workers, lost=st.booleans())
    def go(self, worker: str, lost: bool) -> None:
        if worker in self.cell.broker.registry.workers:
            (self.cell.lose if lost else self.cell.leave)(worker)

    @rule(worker=workers, which=st.integers(0, 9), code=st.sampled_from([0, 0, 50001, WorkerDrainingError.code]))
    def end(self, worker: str, which: int, code: int) -> None:
        known = self.cell.broker.registry.workers.get(worker)
        if known is not None and known.live:
            instance, request, attempt = list(known.live)[which % len(known.live)]
            self._end(worker, instance, request, attempt, code)

    def _end(self, worker: str, instance: int, request: int, attempt: int, code: int) -> None:
        fabric = self.parent if instance == self.parent.instances["alice"] else self.cell
        self.cell.instances["of it"] = instance
        assert instance in fabric.instances.values()
        self.cell.end(worker, "of it", request, attempt, code)
        del self.cell.instances["of it"]

    # ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(
        above=st.sampled_from([True, True, False]),
        model=names,
        operation=st.sampled_from(["generate", "generate", "embed"]),
        again=st.sampled_from([0, 0, 1, 2]),
        attempt=st.integers(0, 2),
        resume_from=st.sampled_from([0, 0, 7]),
        deadline_ms=st.sampled_from([None, None, 700]),
    )
    def submit(
        self,
        above: bool,
        model: str,
        operation: Operation,
        again: int,
        attempt: int,
        resume_from: int,
        deadline_ms: int | None,
    ) -> None:
        self.number += not again
        request = max(1, self.number - again)
        fabric, client = (self.parent, "alice") if above else (self.cell, "bob")
        fabric.submit(
            client, request, operation, model=model, attempt=attempt, resume_from=resume_from, deadline_ms=deadline_ms
        )

    @rule(above=st.booleans(), again=st.integers(0, 3))
    def cancel(self, above: bool, again: int) -> None:
        fabric, client = (self.parent, "alice") if above else (self.cell, "bob")
        fabric.cancel(client, max(1, self.number - again))

    # ── between the two ─────────────────────────────────────────────────────────────────────────────────────────────

    @rule()
    def arrive(self) -> None:
        self.levels.settle()

    @rule(back=st.booleans())
    def cut(self, back: bool) -> None:
        if self.levels.connected:
            self.levels.cut()
        if back:
            self.levels.connect()

    @rule(duration_ms=st.sampled_from([20, 150, 1_000]))
    def wait(self, duration_ms: int) -> None:
        self.levels.pass_ms(duration_ms)

    # ── what holds ──────────────────────────────────────────────────────────────────────────────────────────────────

    @rule()
    def is_the_sum(self) -> None:
        """What the parent knows is what the workers say, added up here in another way."""
        if not self.levels.connected:
            self.levels.connect()
        self.levels.look()
        peer = self.levels.peer
        assert peer is not None
        present = self.cell.broker.registry.workers
        said = {name: [it.hosts[name].info for it in present.values() if name in it.hosts] for name in NAMES}
        offered = {adapter for it in present.values() for host in it.hosts.values() for adapter in host.info.loadable}
        assert set(peer.hosts) == {name for name, infos in said.items() if infos} | offered
        for name, infos in said.items():
            if infos:
                self._check_model(peer.hosts[name].info, infos, name)
        ready = [it for it in present.values() if it.state is WorkerState.READY]
        assert peer.speed == sum(it.speed for it in ready)
        self._check_slots(sum(max(0, it.free) for it in ready), sum(it.load.slots for it in ready))

    def _check_model(self, told: ModelInfo, infos: list[ModelInfo], name: str) -> None:
        able = [set(info.capabilities) for info in infos]
        makers = [info for info in infos if "generate" in info.capabilities]
        assert {"generate", "embed"}.intersection(told.capabilities) == {"generate", "embed"} & set().union(*able)
        assert ("resume" in told.capabilities) == any({"generate", "resume"} <= one for one in able)
        for ability in ("chat", "multimodal"):
            assert (ability in told.capabilities) == (bool(makers) and all(ability in it.capabilities for it in makers))
        for parameter in ("seed", "top_p", "stop"):
            assert (told.parameters is None or parameter in told.parameters) == all(
                it.parameters is None or parameter in it.parameters for it in makers or infos
            )
        assert told.context_length == min(info.context_length for info in infos)
        assert told.details.items() == set.intersection(*[set(info.details.items()) for info in infos])
        # What is promised is kept: the cell's own dispatch finds somebody for it.
        model = self.cell.broker.registry.models[name]
        for operation in ("generate", "embed"):
            for resumes in (0, 7):
                if operation in told.capabilities and (
                    not resumes or (operation, "resume" in told.capabilities) == ("generate", True)
                ):
                    assert self.cell.broker.registry.supply(model, demand_of(operation, resumes)).hosts
        for alias in told.aliases:
            assert self.cell.broker.registry.find(alias) is model

    def _check_slots(self, free: int, slots: int) -> None:
        peer, cell = self.levels.peer, self.levels.session.requests
        assert peer is not None
        waiting = sum(len(model.queue) for model in self.cell.broker.registry.models.values())
        own_turn = bool(slots and not free and waiting and not cell.waiting)
        assert peer.load.slots - peer.in_flight == (free + own_turn - cell.waiting if slots else -peer.in_flight)

    @invariant()
    def nobody_gets_two_terminals(self) -> None:
        for terminal in self.parent.terminals.pop("alice", []):
            self.asked[terminal.request, terminal.attempt] += 1
        self.cell.terminals.pop("bob", None)

    def teardown(self) -> None:
        """Everything ends: then nothing is left at either."""
        levels = self.levels
        if not levels.connected:
            levels.connect()
        for _ in range(4):
            levels.pass_ms(2_000)
            for worker in list(self.cell.broker.registry.workers.values()):
                for key in list(worker.live):
                    self._end(worker.name, *key, 0)
            levels.settle()
            self.parent.cancel("alice", *range(1, self.number + 1))
            self.cell.cancel("bob", *range(1, self.number + 1))
            levels.settle()
        levels.look()
        check_rest(self.parent.broker)
        check_rest(self.cell.broker)
        assert not levels.session.requests.owed
        assert not self.cell.broker.routes.remote
        assert CELL in self.parent.broker.registry.workers
        levels.pass_ms(20_000)
        assert not levels.session.requests.remote.clients
        assert not levels.session.requests._kept


TestCell = CellMachine.TestCase
TestCell.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
