"""One run: a cluster under faults, then healed, then at rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from zfabric.core.broker_config import BrokerConfig
from zfabric.errors import FAILOVER_CODES, FabricError, RequestCancelledError
from zfabric.limits import ATTEMPTS_WITHOUT_PROGRESS_MAX
from zfabric.testing.actors import SimClient, SimController, SimWorker
from zfabric.testing.checkers import Record, Violation, check_bounds, check_rest
from zfabric.testing.network import Network
from zfabric.testing.world import MILLISECOND, World


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Size and duration of a run.

    Attributes:
        workers, clients: How many at most; a run draws its own numbers.
        requests: How many at most.
        fault_ms: How long faults happen.
        heal_ms: How long everything may take to come to rest after the last fault.
    """

    workers: int = 4
    clients: int = 4
    requests: int = 40
    fault_ms: int = 12_000
    heal_ms: int = 90_000


@dataclass
class Report:
    """What happened in a run.

    Attributes:
        seed: Replays it.
        faults: Injected, by kind.
        outcomes: Terminals, by the name of the error, or "done".
        failovers: Attempts beyond the first.
        recovered: Streams put together again after a controller's start.
        steps: Things that happened.
    """

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failovers: int = 0
    recovered: int = 0
    steps: int = 0


def simulate(seed: int, options: ClusterOptions | None = None) -> Report:
    """Run one cluster.

    Raises:
        Violation: A promise was broken; the message names the seed and the command that replays it.
    """
    cluster = Cluster(seed, options or ClusterOptions())
    try:
        return cluster.run()
    except Exception as error:
        at_ms = cluster.world.now_ns // MILLISECOND
        raise Violation(
            f"{type(error).__name__}: {error} [seed={seed} at {at_ms} ms; replay: python -m zfabric.testing --seed {seed}]"
        ) from error


class Cluster:
    """The parts of one run."""

    def __init__(self, seed: int, options: ClusterOptions) -> None:
        self.options = options
        self.world = world = World(seed)
        self.report = Report(seed)
        self.network = Network(world)
        rng = world.rng
        self.controller = SimController(
            world,
            self.network,
            BrokerConfig(
                policy=rng.choice(["shortest_queue", "lottery", "power_of_two", "round_robin", "least_latency"]),
                queue_depth_max=rng.choice([4, 1_000]),
                stall_ms=4_000,
            ),
        )
        self.workers = [
            SimWorker(
                world,
                self.network,
                f"w{number}",
                rng.choice([1, 2, 8]),
                resumes=rng.random() < 0.8,
                step_ms=rng.choice([2, 10, 40]),
            )
            for number in range(rng.randint(1, options.workers))
        ]
        self.clients = [SimClient(world, self.network, number) for number in range(rng.randint(1, options.clients))]
        self.records: list[Record] = []

    def run(self) -> Report:
        """Faults, then healing, then rest."""
        begin_ns = self.world.now_ns
        end_ns = begin_ns + self.options.fault_ms * MILLISECOND
        self._plan_requests()
        self._plan_faults()
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

    # ── what happens ────────────────────────────────────────────────────────────────────────────────────────────────

    def _plan_requests(self) -> None:
        rng = self.world.rng
        for number in range(rng.randint(1, self.options.requests)):
            client = rng.choice(self.clients)
            count = rng.choice([1, 2, 10, 50, 200])
            seeded = rng.random() < 0.85
            deadline_ms = rng.choice([None, None, None, 100, 2_000, 9_000])
            window = rng.choice([4, 32, 1_024])
            delay = rng.choice([0.0, 0.0, 5.0, 300.0])

            def submit(
                client: SimClient = client,
                number: int = number,
                count: int = count,
                seeded: bool = seeded,
                deadline_ms: int | None = deadline_ms,
                window: int = window,
                delay: float = delay,
            ) -> None:
                if client.alive:
                    record = client.submit(
                        number, count, seeded=seeded, deadline_ms=deadline_ms, window=window, delay=delay
                    )
                    self.records.append(record)
                    if rng.random() < 0.15:
                        self.world.after(rng.uniform(0, 1_500), lambda: client.cancel(record))

            self.world.after(rng.uniform(0, self.options.fault_ms * 0.9), submit)

    def _plan_faults(self) -> None:
        rng = self.world.rng
        actors: list[SimWorker | SimClient] = [*self.workers, *self.clients]
        kinds: dict[str, Callable[[], None]] = {
            "worker killed": self._kill_worker,
            "worker frozen": lambda: rng.choice(self.workers).freeze(rng.choice([300, 2_000, 6_000])),
            "engine hung": self._hang_engine,
            "worker link cut": lambda: self._cut(rng.choice(self.workers)),
            "client link cut": lambda: self._cut(rng.choice(self.clients)),
            "link silent": lambda: self._silence(rng.choice(actors)),
            "hellos doubled": self._stutter,
            "controller killed": self._kill_controller,
            "client killed": self._kill_client,
            "pipe full": self._overflow,
            "network slow": self._slow,
        }
        chosen = rng.sample(sorted(kinds), rng.randint(0, 5))
        for name in chosen:
            for _ in range(rng.randint(1, 3)):
                self.world.after(rng.uniform(50, self.options.fault_ms), self._fault(name, kinds[name]))

    def _fault(self, name: str, call: Callable[[], None]) -> Callable[[], None]:
        def inject() -> None:
            self.report.faults[name] += 1
            call()

        return inject

    def _kill_worker(self) -> None:
        worker = self.world.rng.choice(self.workers)
        worker.die()
        self.world.after(self.world.rng.choice([50, 1_000, 5_000]), worker.start)

    def _kill_controller(self) -> None:
        self.controller.die()
        self.world.after(self.world.rng.choice([10, 500, 2_000]), self.controller.start)

    def _kill_client(self) -> None:
        if len(self.clients) > 1:
            self.world.rng.choice(self.clients).die()

    def _hang_engine(self) -> None:
        worker = self.world.rng.choice(self.workers)
        worker.engine_hangs = True

        def move() -> None:
            worker.engine_hangs = False

        self.world.after(self.world.rng.choice([500, 6_000]), move)

    def _cut(self, actor: SimWorker | SimClient) -> None:
        if actor.alive and actor.link is not None:
            self.network.cut(actor.link)

    def _silence(self, actor: SimWorker | SimClient) -> None:
        if actor.alive and actor.link is not None:
            self.network.silence(actor.link)

    def _stutter(self) -> None:
        self.network.stutters = True

    def _overflow(self) -> None:
        client = self.world.rng.choice(self.clients)
        if client.link is not None:
            self.controller.overflow(client.link.routing_id)

    def _slow(self) -> None:
        self.network.slow = True

        def fast() -> None:
            self.network.slow = False

        self.world.after(2_000, fast)

    def _heal(self) -> None:
        """No more faults: everything that died comes back, but for clients."""
        self.network.slow = False
        self.controller.start()
        for worker in self.workers:
            worker.engine_hangs = False
            worker.start()

    # ── checks ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        broker = self.controller.broker
        if broker is not None:
            check_bounds(broker)
            self._check_dead_workers()
        for record in self.records:
            if self.clients[record.client].alive:
                record.check_deadline(self.world.now_ns)
                record.check_window(at_terminal=bool(record.endings))

    def _check_dead_workers(self) -> None:
        """What a dead worker had is settled within its lease."""
        broker = self.controller.broker
        assert broker is not None
        now_ns, lease_ns = self.world.now_ns, broker.config.lease_ms * MILLISECOND
        for worker in self.workers:
            known = broker.registry.workers.get(worker.name)
            if known is None or worker.died_ns is None or known.instance != worker.session.instance:
                continue
            if now_ns - max(worker.died_ns, self.controller.started_ns) > lease_ns + 150 * MILLISECOND:
                raise Violation(f"worker {worker.name} is dead for longer than its lease and still registered")

    def _check_migrated(self, record: Record) -> None:
        """Promise 4: an answer that can be continued does not end because a worker or a controller did."""
        error, pending = record.error, record.pending
        if error is None or error.code not in FAILOVER_CODES or not record.exact or pending is None:
            return
        if all(worker.resumes for worker in self.workers) and pending.barren < ATTEMPTS_WITHOUT_PROGRESS_MAX:
            raise Violation(f"{record} ended with {error!r} after {pending.attempt} attempts, and could have gone on")

    def _quiet(self) -> bool:
        return all(record.endings for record in self.records if self.clients[record.client].alive)

    def _check_end(self) -> None:
        for record in self.records:
            if not self.clients[record.client].alive:
                continue
            if record.endings != 1:
                raise Violation(f"{record} ended {record.endings} times")
            self._check_migrated(record)
        for client in self.clients:
            counters = client.session.counters
            if counters.gaps or counters.repeated_chunks:
                raise Violation(f"client {client.number} saw {counters.gaps} gaps, {counters.repeated_chunks} repeats")
            if client.alive and (client.session.requests or client.session.busy):
                raise Violation(f"client {client.number} keeps requests at rest")
        for worker in self.workers:
            if worker.active or worker.session.streams:
                raise Violation(f"worker {worker.name} keeps {list(worker.session.streams)} at rest")
            if not worker.session.registered:
                raise Violation(f"worker {worker.name} did not come back")
        broker = self.controller.broker
        assert broker is not None
        check_rest(broker)

    def _finish(self) -> Report:
        report = self.report
        broker = self.controller.broker
        for record in self.records:
            error: FabricError | None = record.error
            if isinstance(error, RequestCancelledError):
                report.outcomes["cancelled"] += 1
            elif record.endings:
                report.outcomes["done" if error is None else type(error).__name__] += 1
        report.failovers = sum(client.session.counters.failovers for client in self.clients)
        report.recovered = broker.recovery.matched if broker is not None else 0
        report.steps = self.world.steps
        return report
