"""The scheduler, its queues and the registry under any sequence of messages: what is promised of them holds after each."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.peers import FakeFabric, model
from zfabric.core.controller import candidates, hosting, queues, registry
from zfabric.core.controller.hosting import Hosting
from zfabric.core.controller.peers import Request, WorkerState
from zfabric.core.controller.reasons import Reasons
from zfabric.core.controller.scaling import Rule
from zfabric.errors import WorkerDrainingError
from zfabric.ids import milliseconds
from zfabric.limits import MODEL_MEMORY_MS, UNTAKEN_MS
from zfabric.testing.checkers import check_bounds, check_rest
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo

NAMES = ("a", "b")
WORKERS = ("w0", "w1", "w2")
CLIENTS = ("alice", "bob")

names = st.sampled_from(NAMES)
capabilities = st.lists(st.sampled_from(["generate", "embed", "resume"]), unique=True, max_size=3)
models = st.lists(
    st.builds(
        lambda name, able, aliases, slots: model(name, *(able or ["count_tokens"]), aliases=aliases, slots=slots),
        names,
        capabilities,
        st.lists(names, unique=True, max_size=2),
        st.sampled_from([0, 0, 1]),
    ),
    unique_by=lambda info: info.name,
    max_size=3,
)
workers = st.sampled_from(WORKERS)
clients = st.sampled_from(CLIENTS)
slots = st.integers(0, 3)
operations = st.sampled_from(["generate", "generate", "embed", "count_tokens"])


class DeskMachine(RuleBasedStateMachine):
    """Three workers and two clients, of which each may do anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.owed: Counter[tuple[str, int, int]] = Counter()
        self.progress = 0

    @initialize(
        recovering=st.booleans(),
        policy=st.sampled_from(["shortest_queue", "lottery", "round_robin"]),
        few=st.sampled_from([1, 16]),
        compared=st.sampled_from([1, 64]),
    )
    def start(self, recovering: bool, policy: str, few: int, compared: int) -> None:
        """More than a few hosts are kept in order; what is a few is drawn, since three workers are no more than that."""
        self.patch = pytest.MonkeyPatch()
        for module in (candidates, hosting, registry):
            self.patch.setattr(module, "CANDIDATES_UNORDERED_MAX", few)
        self.patch.setattr(queues, "COMPARED_MAX", compared)
        self.fabric = FakeFabric(
            recovery_ms=3_000 if recovering else 0, queue_depth_max=4, policy=policy, stall_ms=4_000
        )
        for name in (*CLIENTS, "operator"):
            self.fabric.client(name)

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def present(self, worker: str) -> bool:
        return worker in self.fabric.broker.registry.workers

    @rule(worker=workers, models=models, slots=slots, draining=st.booleans())
    def announce(self, worker: str, models: list[ModelInfo], slots: int, draining: bool) -> None:
        again = self.present(worker)
        self.fabric.worker(worker, *models, slots=slots, draining=draining and not again, again=again)

    @rule(worker=workers, slots=slots, moved=st.booleans(), draining=st.sampled_from([False, False, False, True]))
    def load(self, worker: str, slots: int, moved: bool, draining: bool) -> None:
        if self.present(worker):
            self.progress += moved
            self.fabric.load(worker, slots=slots, progress=self.progress, draining=draining)

    @rule(worker=workers, lost=st.booleans())
    def go(self, worker: str, lost: bool) -> None:
        if self.present(worker):
            (self.fabric.lose if lost else self.fabric.leave)(worker)

    @rule(worker=workers, which=st.integers(0, 9), code=st.sampled_from([0, 0, 50001, WorkerDrainingError.code]))
    def end(self, worker: str, which: int, code: int) -> None:
        live = list(self.fabric.broker.registry.workers[worker].live) if self.present(worker) else []
        if live:
            instance, request, attempt = live[which % len(live)]
            client = next(name for name in CLIENTS if self.fabric.instances[name] == instance)
            self.fabric.end(worker, client, request, attempt, code)

    # ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(
        client=clients,
        operation=operations,
        model=names,
        priority=st.integers(-1, 1),
        again=st.sampled_from([0, 0, 0, 1, 2, 3]),
        attempt=st.integers(0, 3),
        resume_from=st.sampled_from([0, 0, 7]),
        deadline_ms=st.sampled_from([None, None, None, 0, 2_000]),
    )
    def submit(
        self,
        client: str,
        operation: Operation,
        model: str,
        priority: int,
        again: int,
        attempt: int,
        resume_from: int,
        deadline_ms: int | None,
    ) -> None:
        """A new request, or one of the last again."""
        if not again:
            self.number += 1
        request = max(1, self.number - again)
        peer = self.fabric.broker.registry.clients[self.fabric.instances[client]]
        known = peer.requests.get(request)
        if known is not None and known.attempt >= attempt:
            pass
        else:
            # What an engine still has of a former run of this client is refused, and replaces nothing.
            refused = (peer.instance, request, attempt) in self.fabric.broker.registry.live
            if known is not None and not refused:
                del self.owed[client, request, known.attempt]
            self.owed[client, request, attempt] += 1
        self.fabric.submit(
            client,
            request,
            operation,
            model=model,
            priority=priority,
            attempt=attempt,
            resume_from=resume_from,
            deadline_ms=deadline_ms,
        )

    @rule(client=clients, count=st.integers(1, 3))
    def cancel(self, client: str, count: int) -> None:
        self.fabric.cancel(client, *range(self.number - count, self.number))

    # ── operators ───────────────────────────────────────────────────────────────────────────────────────────────────

    def order(self, what: str, **arguments: object) -> None:
        self.fabric.query("operator", what, **arguments)

    @rule(model=names, wait_ms=st.sampled_from([0, 2_000, UNTAKEN_MS]))
    def pause(self, model: str, wait_ms: int) -> None:
        self.order("pause", model=model, wait_ms=wait_ms)

    @rule(model=names)
    def resume(self, model: str) -> None:
        self.order("resume", model=model)

    @rule(scaled=st.sets(names), wait_s=st.sampled_from([0.0, 1.0, 100.0]))
    def scale(self, scaled: set[str], wait_s: float) -> None:
        self.fabric.scale([Rule(model=name, min=0, max=2, wait_s=wait_s) for name in sorted(scaled)])

    @rule(worker=workers, stay=st.booleans())
    def drain(self, worker: str, stay: bool) -> None:
        self.order("drain", worker=worker, stay=stay)

    @rule(worker=workers)
    def undrain(self, worker: str) -> None:
        self.order("undrain", worker=worker)

    @rule(back=st.integers(0, 3))
    def cancel_anybodys(self, back: int) -> None:
        self.order("cancel", request=f"{max(1, self.number - back):x}")

    @rule(client=clients)
    def kick(self, client: str) -> None:
        """Its requests have their terminals, and it comes back as another run."""
        number = self.fabric.broker.registry.clients[self.fabric.instances[client]].number
        self.order("kick", client=str(number), refuse_ms=0)
        assert not [key for key in self.fabric.broker.registry.clients if key == self.fabric.instances[client]]
        ended = {(client, it.request, it.attempt) for it in self.fabric.terminals.get(client, [])}
        assert {key for key in self.owed if key[0] == client} <= ended
        self.fabric.client(client)

    @rule(
        policy=st.sampled_from(["shortest_queue", "lottery", "round_robin"]), speed=st.sampled_from([0, 0.5, 2, None])
    )
    def configure(self, policy: str, speed: float | None) -> None:
        self.order("set_config", name="policy", value=policy)
        self.order("set_config", name="speed.w0", value=speed)

    @rule(client=clients)
    def come_anew(self, client: str) -> None:
        """A client leaves, and another run of it comes."""
        self.fabric.leave(client)
        self.owed = Counter({key: count for key, count in self.owed.items() if key[0] != client})
        self.fabric.client(client)

    @rule(duration_ms=st.sampled_from([10, 1_000, 5_000, MODEL_MEMORY_MS, UNTAKEN_MS]))
    def wait(self, duration_ms: int) -> None:
        self.fabric.pass_ms(duration_ms, *self.fabric.broker.registry.workers)

    # ── what holds ──────────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def every_attempt_gets_one_terminal(self) -> None:
        for client in CLIENTS:
            for terminal in self.fabric.terminals.pop(client, []):
                key = (client, terminal.request, terminal.attempt)
                # One that a worker gives may come after one that the controller gave.
                self.owed[key] -= 1
                if self.owed[key] <= 0:
                    del self.owed[key]
        clients = self.fabric.broker.registry.clients
        waited_for = {
            (client, request.request, request.attempt)
            for client in CLIENTS
            for request in clients[self.fabric.instances[client]].requests.values()
        }
        assert waited_for == set(self.owed)

    @invariant()
    def nothing_waits_that_somebody_could_do(self) -> None:
        paused = self.fabric.broker.registry.directives.paused
        for request in self.fabric.waiting():
            assert request.model is not None
            if request.model.name not in paused:
                assert not [host.name for host in self.hosts_of(request) if able(host, request) and has_slot(host)]

    @invariant()
    def why_it_waits_is_what_the_hosts_say(self) -> None:
        """Judged anew, from announcements, slots and states."""
        broker = self.fabric.broker
        reasons = Reasons(broker.registry, broker.scheduler.queues)
        for request in self.fabric.waiting():
            assert request.model is not None
            able_ones = [host for host in self.hosts_of(request) if able(host, request)]
            taking = [
                host
                for host in able_ones
                if host.worker.state is WorkerState.READY
                and host.worker.load.slots
                and host.engine not in host.worker.hung
            ]
            if request.model.name in broker.registry.directives.paused:
                expected = "paused"
            elif taking:
                expected = "slots"
            elif able_ones:
                expected = "not_taking"
            elif broker.scheduler.queues.recovering:
                expected = "recovering"
            else:
                expected = "capability" if self.hosts_of(request) else "no_worker"
            why = reasons.of(request)
            assert why.reason == expected
            assert why.text

    @invariant()
    def places_are_a_line(self) -> None:
        for known in self.fabric.broker.registry.models.values():
            for demand in known.queue.demands:
                line = list(known.queue.in_order(demand))
                assert set(line) == set(known.queue.waiting(demand))
                assert line[0] is known.queue.head(demand).item
                assert [item.priority for item in line] == sorted(item.priority for item in line)

    @invariant()
    def nothing_waits_without_end(self) -> None:
        """Somebody does it sooner or later, or there is a time at which it ends."""
        recovering = self.fabric.broker.scheduler.queues.recovering
        for request in self.fabric.waiting():
            assert request.model is not None
            supply = request.model.supplies[request.demand]
            taken = any(
                able(host, request) and host.worker.state is WorkerState.READY and host.worker.load.slots
                for host in self.hosts_of(request)
                if host.engine not in host.worker.hung
            )
            directives = self.fabric.broker.registry.directives
            if request.model.name in directives.paused:
                assert supply.timer is not None
            if request.model.name in directives.scaled and not request.model.hosts and not recovering:
                assert supply.timer is not None
            assert taken or supply.timer is not None or request.model.forget is not None or recovering

    @invariant()
    def nothing_waits_for_what_nobody_can_do(self) -> None:
        """Unless somebody could until lately, or everybody is only coming, or nobody serves the name at all."""
        broker = self.fabric.broker
        remembered_ns = milliseconds(MODEL_MEMORY_MS)
        for request in self.fabric.waiting():
            assert request.model is not None
            supply = request.model.supplies[request.demand]
            lately = supply.expected and supply.absent_ns is not None
            lately = lately and self.fabric.now_ns - (supply.absent_ns or 0) < remembered_ns
            if request.model.hosts:
                possible = any(able(host, request) for host in self.hosts_of(request))
                assert possible or lately or broker.scheduler.queues.recovering
            elif not request.resume_from:
                found = broker.registry.find(request.asked)
                assert found is request.model or found is None or not found.hosts

    @invariant()
    def the_least_loaded_is_known(self) -> None:
        for known in self.fabric.broker.registry.models.values():
            for supply in known.supplies.values():
                able = [host for host in supply.hosts.values() if host.open]
                if supply.kept and able:
                    least = supply.candidates.least_loaded(random.Random(1))
                    # A host without speed comes last, whatever it has.
                    ratios = [host.worker.in_flight / host.speed if host.speed else math.inf for host in able]
                    assert least.queue_ratio == min(ratios)

    @invariant()
    def tables_agree(self) -> None:
        broker = self.fabric.broker
        check_bounds(broker)
        tables = broker.registry
        assert not tables.changed
        assert not tables.held
        assert set(tables.live) == {key for worker in tables.workers.values() for key in worker.live}
        for worker in tables.workers.values():
            running = Counter(request.model.name for request in worker.live.values() if request.model is not None)
            for host in worker.hosts.values():
                assert host.in_flight == running[host.model.name]
                assert tables.models[host.model.name] is host.model
        for known in tables.models.values():
            asked = [request for requests in known.asked.values() for request in requests]
            assert sorted(map(id, asked)) == sorted(map(id, known.queue.items()))
            assert known.hosts or known.forget is not None or known.name in tables.directives.scaled

    @invariant()
    def a_name_stands_for_whoever_serves_it(self) -> None:
        tables = self.fabric.broker.registry
        for name in NAMES:
            hosts = [host for worker in tables.workers.values() for host in worker.hosts.values()]
            own = [host.model for host in hosts if host.model.name == name]
            aliased = [host.model for host in hosts if name in host.info.aliases]
            found = tables.find(name)
            if own or aliased:
                assert found in (own or aliased)
            else:
                # Nobody serves it now: it is remembered of whom it was, or not at all.
                assert found is None or name in (found.name, *found.aliases)

    def hosts_of(self, request: Request) -> list[Hosting]:
        assert request.model is not None
        workers = self.fabric.broker.registry.workers.values()
        return [host for worker in workers for host in worker.hosts.values() if host.model is request.model]

    def teardown(self) -> None:
        """Everybody leaves, and some time later nothing is left."""
        if not hasattr(self, "fabric"):
            return
        self.patch.undo()
        fabric, broker = self.fabric, self.fabric.broker
        fabric.scale([])
        for worker in list(broker.registry.workers):
            fabric.leave(worker)
        fabric.pass_ms(UNTAKEN_MS + MODEL_MEMORY_MS)
        assert not fabric.waiting()
        assert not broker.registry.models
        assert not len(broker.registry._names)
        assert not broker.scheduler.queues._waiting
        assert not broker.scheduler.queues._asked
        check_rest(broker)
        self.every_attempt_gets_one_terminal()
        assert not self.owed
        assert not len(broker.timers)


def able(host: Hosting, request: Request) -> bool:
    """Whether a host can do what is asked, by its announcement."""
    known = host.info.capabilities
    return request.operation in known and (not request.resume_from or "resume" in known)


def has_slot(host: Hosting) -> bool:
    """Whether a host could take a request now, counted anew."""
    worker = host.worker
    if worker.state is not WorkerState.READY or host.engine in worker.hung:
        return False
    held = [request for request in worker.live.values() if request.engine not in worker.hung]
    mine = sum(request.model is not None and request.model.name == host.model.name for request in held)
    return len(held) < worker.load.slots and (not host.info.slots or mine < host.info.slots)


TestDesk = DeskMachine.TestCase
TestDesk.settings = settings(max_examples=120, stateful_step_count=70, deadline=None)
