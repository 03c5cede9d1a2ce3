"""One run: a cluster under faults and among outsiders, then healed, then at rest."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.dispatch import BUILT_IN, POLICIES, register_policy
from zfabric.errors import PoisonousRequestError, RequestCancelledError
from zfabric.limits import ATTEMPTS_WITHOUT_PROGRESS_MAX
from zfabric.testing.apps import SimApp
from zfabric.testing.catalogue import draw_engines, draw_habits
from zfabric.testing.checkers import check_announced, check_bounds, check_circuits, check_liveness, check_rest
from zfabric.testing.clients import SimClient
from zfabric.testing.controllers import BROKEN_POLICY, SimController, broken_policy
from zfabric.testing.grammar import Gossip
from zfabric.testing.hostile import Hostile, HostileClient, HostileWorker
from zfabric.testing.network import Network
from zfabric.testing.operators import Operators
from zfabric.testing.plan import GENTLE, LOSING, Faults, draw_query, draw_wish
from zfabric.testing.records import Record, Violation, Wish
from zfabric.testing.reports import ClusterOptions, Report
from zfabric.testing.sockets import SimDealer, SimSecrets
from zfabric.testing.substitutes import substituted
from zfabric.testing.workers import SimWorker
from zfabric.testing.world import MILLISECOND, World

#: Bounds of a run whose frames, lists and control messages have to be split.
_TIGHT = {"_ROOM": 600, "FRAME_BYTES_GOAL": 1_024, "CONTROL_BODY_BYTES_MAX": 1_024, "FRAME_BYTES_MAX": 64 * 1_024}


def _tight(seed: int) -> bool:
    return seed % 4 == 3


def simulate(seed: int, options: ClusterOptions | None = None) -> Report:
    """Run one cluster.

    Raises:
        Violation: A promise was broken; the message names the seed and the command that replays it.
    """
    return run_cluster(
        lambda world: Cluster(world, seed, options or ClusterOptions()),
        seed,
        tight=_tight(seed),
        again=f"python -m zfabric.testing --seed {seed}{_several(options)}",
    )


def _several(options: ClusterOptions | None) -> str:
    return f" --controllers {options.controllers}" if options is not None and options.controllers > 1 else ""


def run_cluster(make: Callable[[World], Cluster], seed: int, *, tight: bool, again: str) -> Report:
    """Run a cluster in a world of its own.

    Args:
        tight: Whether frames, lists and control messages have to be split.
        again: The command that runs it again, for the message of a violation.

    Raises:
        Violation: A promise was broken.
    """
    world = World(seed)
    with ExitStack() as stack:
        if tight:
            stack.enter_context(substituted(**_TIGHT))
        clock: dict[str, object] = {"monotonic_ns": lambda: world.now_ns}
        register_policy(BROKEN_POLICY, broken_policy)
        stack.callback(POLICIES.pop, BROKEN_POLICY)
        stack.enter_context(substituted(open_dealer=SimDealer, secrets=SimSecrets(world.rng), **clock))
        cluster = make(world)
        try:
            return cluster.run()
        except Exception as error:
            at_ms = world.now_ns // MILLISECOND
            raise Violation(f"{type(error).__name__}: {error} [seed={seed} at {at_ms} ms; replay: {again}]") from error
        finally:
            cluster.end()


class Cluster:
    """The parts of one run."""

    def __init__(self, world: World, seed: int, options: ClusterOptions) -> None:
        self.options = options
        self.world = world
        self.report = Report(seed)
        self.networks = [Network(world, number) for number in range(options.controllers)]
        self.network = self.networks[0]
        self._draw_traits(seed)
        for network in self.networks:
            network.all = self.networks
            if self.tight:
                network.frame_bytes_max = _TIGHT["FRAME_BYTES_MAX"]
        clients = world.rng.randint(1, options.clients)
        config = self._config(clients)
        self.controllers = [SimController(world, network, config, keyed=self.keyed) for network in self.networks]
        self.workers = self._make_workers()
        self.clients = self._make_clients(clients)
        self.faults = Faults(world, self.networks, self.controllers, self.workers, self.clients)
        self.operators = Operators(seed, world, self.controllers, self.workers, self.clients)
        if options.versions:
            self._mix_versions(random.Random(f"{seed} versions"))
        self.gossip = Gossip(workers=[worker.name for worker in self.workers])
        self.hostile: list[Hostile] = []
        self.records: list[Record] = []
        self._held: dict[str, dict[str, int]] = {}

    def _draw_traits(self, seed: int) -> None:
        rng = self.world.rng
        #: All workers serve the same, and any of them can go on with any answer, but for a few that do not resume.
        self.uniform = rng.random() < 0.4
        self.keyed = rng.random() < 0.5
        self.sound = rng.random() < 0.6
        self.tight = _tight(seed)
        #: In half of all clusters one failure is enough to open a circuit: there are few engines that fail again and again.
        self.circuit_failures = 1 + 4 * (seed % 2)
        #: There is no room for all clients: some are refused for now, and give up after their time to connect.
        self.crowded = rng.random() < 0.1

    def _config(self, clients: int) -> BrokerConfig:
        rng = self.world.rng
        return BrokerConfig(
            policy=rng.choice([*BUILT_IN, BROKEN_POLICY]),
            queue_depth_max=rng.choice([4, 1_000]),
            queue_bytes_max=rng.choice([400, 2**30, 2**30, 2**30]),
            stall_ms=4_000,
            circuit_failures=self.circuit_failures,
            clients_max=max(1, clients - 1) if self.crowded else 1_000,
        )

    def _make_workers(self) -> list[SimWorker]:
        return [self._worker(f"w{number}") for number in range(self.world.rng.randint(1, self.options.workers))]

    def _make_clients(self, count: int) -> list[SimClient | SimApp]:
        kinds: list[type[SimClient] | type[SimApp]] = [SimApp] if self.crowded else [SimClient, SimApp]
        return [self.world.rng.choice(kinds)(self.world, self.network, number) for number in range(count)]

    def _mix_versions(self, rng: random.Random) -> None:
        """As while a fabric is upgraded: whoever comes, or comes back, may be of either version."""
        share = rng.choice([0.0, 0.5, 0.5, 1.0])

        def is_older() -> bool:
            older = rng.random() < share
            self.report.connections["older" if older else "newer"] += 1
            return older

        for network in self.networks:
            network.is_older = is_older

    def _worker(self, name: str) -> SimWorker:
        rng = self.world.rng
        specs = draw_engines(rng, uniform=self.uniform, resumes=rng.random() < 0.8)
        for spec in specs:
            spec.odd_gauges = not self.sound and rng.random() < 0.2
        return SimWorker(self.world, self.network, name, draw_habits(rng), specs)

    def run(self) -> Report:
        """Faults, then healing, then rest."""
        begin_ns = self.world.now_ns
        end_ns = begin_ns + self.options.fault_ms * MILLISECOND
        self._plan_outsiders()
        self._plan_requests()
        self._plan_faults()
        if self.options.operators:
            self.operators.plan(self.options.fault_ms, self._fault)
        while self.world.now_ns < end_ns:
            self.world.run(min(end_ns, self.world.now_ns + 100 * MILLISECOND))
            self._check()
        self._heal()
        limit_ns = end_ns + self.options.heal_ms * MILLISECOND
        while self.world.now_ns < limit_ns and not self._quiet():
            self.world.run(self.world.now_ns + 500 * MILLISECOND)
            self._check()
        # Long enough for the last acknowledgements, beats and leases.
        self.world.run(self.world.now_ns + 8_000 * MILLISECOND)
        self._check_end()
        return self._finish()

    def end(self) -> None:
        """Nothing of it runs any more."""
        for worker in self.workers:
            worker.die()
        for client in self.clients:
            client.die()

    # ── what happens ────────────────────────────────────────────────────────────────────────────────────────────────

    def _plan_outsiders(self) -> None:
        rng = self.world.rng
        for kind, share in ((HostileClient, 0.35), (HostileWorker, 0.3)):
            if rng.random() < share:
                self.hostile.append(
                    kind(
                        self.world,
                        self.network,
                        self.gossip,
                        self.report.hostile,
                        keyed=self.keyed,
                        period_ms=rng.choice([60, 150, 600]),
                    )
                )

    def _plan_requests(self) -> None:
        rng = self.world.rng
        for number in range(1, rng.randint(1, self.options.requests) + 1):
            wish = draw_wish(rng, number, self.workers, uniform=self.uniform, sound=self.sound, tight=self.tight)
            client = rng.choice(self.clients)

            self._submit_after(rng.uniform(0, self.options.fault_ms * 0.9), client, wish)
        for _ in range(rng.randint(0, 6)):
            what, arguments = draw_query(rng)
            client = rng.choice(self.clients)

            def ask(
                client: SimClient | SimApp = client, what: str = what, arguments: dict[str, object] = arguments
            ) -> None:
                if client.alive:
                    client.ask(what, arguments)
                    self.report.operations["query"] += 1

            self.world.after(rng.uniform(0, self.options.fault_ms * 0.9), ask)

    def _submit_after(self, delay_ms: float, client: SimClient | SimApp, wish: Wish) -> None:
        def submit() -> None:
            if client.alive:
                self.records.append(client.submit(wish))
                self.report.operations[wish.operation] += 1

        self.world.after(delay_ms, submit)

    def _plan_faults(self) -> None:
        rng = self.world.rng
        chosen = self.options.faults
        if chosen is None:
            chosen = tuple(rng.sample(sorted(self.faults.kinds), rng.randint(0, 6)))
        for name in chosen:
            for _ in range(rng.randint(1, 3)):
                self.world.after(rng.uniform(50, self.options.fault_ms), self._fault(name, self.faults.kinds[name]))

    def _fault(self, name: str, call: Callable[[], None]) -> Callable[[], None]:
        def inject() -> None:
            self.report.faults[name] += 1
            call()

        return inject

    def _heal(self) -> None:
        """Everything comes back; half of the outsiders stay as they are."""
        self.faults.heal()
        self.operators.heal()
        for hostile in self.hostile:
            if self.world.rng.random() < 0.5:
                hostile.die()

    # ── checks ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        for controller in self.controllers:
            broker = controller.broker
            if broker is not None and not controller.paused:
                check_bounds(broker, set() if set(self.report.faults) & LOSING else self._strangers())
                check_liveness(broker, self.gossip.workers)
                check_circuits(broker)
                self._check_workers(controller)
        for record in self.records:
            if not record.endings and self.clients[record.client].alive:
                record.check_deadline(self.world.now_ns, self.clients[record.client].awake_ns)
                record.check_window()
        self._overhear()

    def _strangers(self) -> set[int]:
        """Instance numbers that only outsiders speak under."""
        spoken = {instance for hostile in self.hostile if hostile.alive for instance in hostile.instances}
        return spoken - {client.session.instance for client in self.clients if client.alive}

    def _overhear(self) -> None:
        """What outsiders come to know."""
        if self.hostile:
            gossip = self.gossip
            gossip.attempts = [
                (client.session.instance, pending.number, pending.attempt)
                for client in self.clients
                for pending in list(client.session.requests.values())[:10]
            ]
            welcomes = [client.session.welcome for client in self.clients]
            gossip.sessions = [welcome.session for welcome in welcomes if welcome is not None]

    def _check_workers(self, controller: SimController) -> None:
        """What a dead worker had is settled within its lease, what a hung engine had within the stall time, and no unit
        stays behind that its reader's credit allows."""
        broker = controller.broker
        assert broker is not None
        now_ns, config = self.world.now_ns, broker.config
        for worker in self.workers:
            known = broker.registry.workers.get(worker.name)
            if known is not None and worker.died_ns is not None and known.instance == worker.session.instance:
                gone_ms = (now_ns - max(worker.died_ns, controller.awake_ns)) // MILLISECOND
                if gone_ms > config.lease_ms + 150:
                    raise Violation(f"worker {worker.name} is dead for longer than its lease and still registered")
            if worker.alive and worker.session.registered and not worker.frozen and known is not None:
                awake_ns = max(controller.awake_ns for controller in self.controllers)
                worker.check_hung(config.stall_ms + 3 * config.beat_ms, awake_ns)
                if controller is self.controllers[0]:
                    self._check_held(worker)

    def _check_held(self, worker: SimWorker) -> None:
        held = worker.held()
        before = self._held.get(worker.name, {})
        for request_id, unit in held.items():
            if before.get(request_id) == unit:
                raise Violation(f"worker {worker.name} holds back {request_id} at {unit}, with credit for more")
        self._held[worker.name] = held

    def _check_migrated(self, record: Record) -> None:
        """Promise 4: an answer that can be continued does not end because a worker or a controller did."""
        pending, wish = record.pending, record.wish
        # A controller that is full of clients lets a newcomer take the place of one that is away.
        gentle = set(self.report.faults) <= GENTLE and not self.crowded
        if len(self.controllers) > 1 and self.report.connections["older"]:
            # An older controller asks no worker for what came by another.
            gentle = False
        lost = record.lost or isinstance(record.error, PoisonousRequestError)
        if lost and wish.number in self.faults.kept and gentle:
            raise Violation(f"{record} ended with {record.error!r}, and everybody was there")
        if not record.lost or wish.resume == "never" or pending is None or not self.uniform:
            return
        if wish.operation == "operate" or "worker announces" in self.report.faults:
            return
        resumes = all("resume" in spec.models[0].capabilities for worker in self.workers for spec in worker.specs)
        if resumes and pending.barren < ATTEMPTS_WITHOUT_PROGRESS_MAX:
            raise Violation(f"{record} ended with {record.error!r} after {pending.attempt} attempts, and could go on")

    def _quiet(self) -> bool:
        questions = (question for client in self.clients if client.alive for question in client.questions)
        records = (record for record in self.records if self.clients[record.client].alive)
        return all(record.endings for record in records) and all(question.answers for question in questions)

    def _check_end(self) -> None:
        for record in self.records:
            if self.clients[record.client].alive:
                if record.endings != 1:
                    raise Violation(f"{record} ended {record.endings} times")
                self._check_migrated(record)
        for client in self.clients:
            self._check_client_end(client)
        for worker in self.workers:
            if not all(session.registered for session in worker.session):
                raise Violation(f"worker {worker.name} did not come back")
        strangers = self._strangers()
        for controller in self.controllers:
            broker = controller.broker
            assert broker is not None
            check_rest(broker, [worker.name for worker in self.workers], strangers)
            for worker in self.workers:
                check_announced(broker, worker.name, worker.models)
        for worker in self.workers:
            worker.check_rest(strangers)

    def _check_client_end(self, client: SimClient | SimApp) -> None:
        counters = client.session.counters
        if counters.gaps or counters.repeated_chunks:
            raise Violation(f"client {client.number} saw {counters.gaps} gaps, {counters.repeated_chunks} repeats")
        if isinstance(client, SimApp) and client.client.figures()["bad_messages"]:
            raise Violation(f"client {client.number} was sent something that it could not use")
        if counters.faults or counters.broken:
            raise Violation(f"client {client.number} met {counters.faults} faults, {counters.broken} broken answers")
        if not client.alive:
            return
        if client.session.requests or client.session.busy:
            raise Violation(f"client {client.number} keeps requests at rest")
        for question in client.questions:
            if not question.answers:
                raise Violation(f"client {client.number} has no answer to {question.what!r}")

    def _finish(self) -> Report:
        report = self.report
        for record in self.records:
            error = record.error
            if isinstance(error, RequestCancelledError):
                report.outcomes["cancelled"] += 1
            elif record.endings:
                report.outcomes["done" if error is None else type(error).__name__] += 1
        report.failovers = sum(client.session.counters.failovers for client in self.clients)
        report.recovered = sum(controller.matched for controller in self.controllers)
        report.steps = self.world.steps
        return report
