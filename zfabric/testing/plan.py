"""What happens in a run: requests, queries and faults, drawn from its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from zfabric.testing.apps import SimApp
from zfabric.testing.catalogue import ALIASES, MODELS, NAMES
from zfabric.testing.clients import SimClient
from zfabric.testing.controllers import SimController
from zfabric.testing.network import Network
from zfabric.testing.records import VALUES_MANY, Wish
from zfabric.testing.tasks import in_turn
from zfabric.testing.workers import SimWorker
from zfabric.testing.world import MILLISECOND, World
from zfabric.wire.fields import Operation

_OPERATIONS: Final[tuple[Operation, ...]] = (
    "generate",
    "generate",
    "generate",
    "generate",
    "embed",
    "count_tokens",
    "operate",
)
#: Losses so far apart have nothing to do with each other.
_APART_NS: Final = 4_000 * MILLISECOND
_QUERIES: Final = ("models", "model", "workers", "status", "refresh")

#: Faults that cost connections, and no process: what both ends still have goes on.
GENTLE = {
    "client closed",
    "client killed",
    "client link cut",
    "hellos doubled",
    "network slow",
    "pipe full",
    "worker link cut",
}


#: Faults after which a client may say with right that it has lost an attempt.
LOSING = {
    "controller drains", "controller killed", "controller leaves", "controller paused", "controller unplugged", "engine hung",
    "link silent",
    "worker drained", "worker frozen", "worker killed", "worker link cut", "worker announces",
}  # fmt: skip


def draw_wish(
    rng: random.Random, number: int, workers: list[SimWorker], *, uniform: bool, sound: bool, tight: bool
) -> Wish:
    """One request.

    Args:
        uniform: All workers serve the same, and it is asked for.
        sound: Whatever is asked and answered can be encoded.
        tight: Frames are small, and some answers are large.
    """
    operation = rng.choice(_OPERATIONS)
    name = rng.choice([MODELS[0], ALIASES[0]]) if uniform else rng.choice(NAMES)
    worker = rng.choice(workers) if operation == "operate" else None
    if worker is not None:
        name = rng.choice(["", rng.choice(rng.choice(worker.specs).models).name])
    return Wish(
        number=number,
        operation=in_turn(operation, number),
        model=name,
        worker=worker.name if worker is not None else "",
        count=rng.choice([1, 2, 10, 50, 120]),
        draw=rng.choice(["greedy", "greedy", "seeded", "unseeded"]),
        resume=rng.choice(["exact", "exact", "exact", "any", "never"]),
        priority=rng.choice([0, 0, 0, -5, 3]),
        deadline_ms=rng.choice([None, None, None, 100, 2_000, 9_000]),
        window=rng.choice([4, 32, 1_024]),
        read_delay_ms=rng.choice([0.0, 0.0, 5.0, 300.0]),
        breaks_at=None if sound or rng.random() < 0.8 else rng.choice([0, 1, 5, 8]),
        unsendable=not sound and rng.random() < 0.1,
        values=rng.choice([1, 1, 500, VALUES_MANY]) if tight else 1,
        cancel_after_ms=rng.choice([0.0, rng.uniform(0, 1_500)]) if rng.random() < 0.15 else None,
    )


def draw_query(rng: random.Random) -> tuple[str, dict[str, object]]:
    """One question to the controller."""
    what = rng.choice(_QUERIES)
    return what, {"name": rng.choice(NAMES)} if what == "model" else {}


class Faults:
    """Everything that can go wrong, by name."""

    def __init__(
        self,
        world: World,
        networks: list[Network],
        controllers: list[SimController],
        workers: list[SimWorker],
        clients: list[SimClient | SimApp],
    ) -> None:
        self.world = world
        self.networks = networks
        self.controllers = controllers
        self.workers = workers
        self.clients = clients
        #: Requests that an engine worked on when a connection of theirs was lost, and no other was lost soon before or after:
        #: what both ends still have goes on.
        self.kept: set[int] = set()
        self._lost_ns = -_APART_NS
        self._over = False
        rng = world.rng
        actors: list[SimWorker | SimClient | SimApp] = [*workers, *clients]
        self.kinds: dict[str, Callable[[], None]] = {
            "worker killed": self._kill_worker,
            "worker frozen": lambda: rng.choice(workers).freeze(rng.choice([300, 2_000, 6_000])),
            "worker drained": self._drain_worker,
            "worker announces": self._announce,
            "engine hung": self._hang_engine,
            "worker link cut": lambda: self.cut(rng.choice(workers)),
            "client link cut": lambda: self.cut(rng.choice(clients)),
            "link silent": lambda: self._silence(rng.choice(actors)),
            "hellos doubled": self._stutter,
            "controller killed": self._kill_controller,
            "controller leaves": self._stop_controller,
            "controller drains": self._drain_controller,
            "controller paused": lambda: self._controller().pause(rng.choice([500, 2_900, 3_600, 6_000])),
            "client frozen": lambda: rng.choice(clients).freeze(rng.choice([300, 2_000, 6_000])),
            "client killed": self._kill_client,
            "client closed": self._close_client,
            "pipe full": self._overflow,
            "network slow": self._slow,
        }

        if len(networks) > 1:
            self.kinds["controller unplugged"] = lambda: rng.choice(networks).unplug(rng.choice([500, 4_000, 9_000]))

    def _controller(self) -> SimController:
        """One of them."""
        controllers = self.controllers
        return controllers[0] if len(controllers) == 1 else self.world.rng.choice(controllers)

    def _kill_worker(self) -> None:
        worker = self.world.rng.choice(self.workers)
        worker.die()
        self.world.after(self.world.rng.choice([50, 1_000, 5_000]), worker.start)

    def _drain_worker(self) -> None:
        """By signals at its host, or by an operator."""
        rng = self.world.rng
        worker, limit_ms = rng.choice(self.workers), rng.choice([200, 5_000])
        if rng.random() < 0.5:
            worker.drain(limit_ms)
            return
        worker.is_queried_to_drain(limit_ms)
        for _ in range(2):
            client = rng.choice(self.clients)
            if client.alive:
                client.ask("drain", {"worker": worker.name, "limit_ms": limit_ms})

    def _announce(self) -> None:
        """At any time, or just when a worker that comes back has said what it served before."""
        worker = self.world.rng.choice(self.workers)
        if self.world.rng.random() < 0.5:
            worker.reannounce()
        else:
            worker.changes_behind_hello = True
            self.cut(worker)

    def _kill_controller(self) -> None:
        controller = self._controller()
        controller.die()
        self.world.after(self.world.rng.choice([10, 500, 2_000]), controller.start)

    def _stop_controller(self, controller: SimController | None = None) -> None:
        controller = controller or self._controller()
        controller.leave()
        self.world.after(self.world.rng.choice([30, 500, 2_000]), controller.start)

    def _drain_controller(self) -> None:
        controller = self._controller()
        controller.drain()

        def stop() -> None:
            if not self._over:
                self._stop_controller(controller)

        self.world.after(self.world.rng.choice([500, 4_000]), stop)

    def _kill_client(self) -> None:
        if sum(client.alive for client in self.clients) > 1:
            self.world.rng.choice(self.clients).die()

    def _close_client(self) -> None:
        if sum(client.alive for client in self.clients) > 1:
            self.world.rng.choice(self.clients).close()

    def _hang_engine(self) -> None:
        worker = self.world.rng.choice(self.workers)
        if not worker.engines:
            return
        engine = self.world.rng.choice(worker.engines)
        engine.hung_ns = self.world.now_ns

        def move() -> None:
            engine.hung_ns = None

        self.world.after(self.world.rng.choice([500, 6_000, 12_000]), move)

    def cut(self, actor: SimWorker | SimClient | SimApp) -> None:
        """A connection is lost."""
        link = actor.link if actor.alive else None
        if link is not None:
            self._keep(actor)
            link.network.cut(link)

    def _keep(self, actor: SimWorker | SimClient | SimApp) -> None:
        """A connection is about to be lost."""
        now_ns, before_ns = self.world.now_ns, self._lost_ns
        self._lost_ns = now_ns
        if now_ns - before_ns < _APART_NS:
            self.kept.clear()
            return
        if now_ns - max(controller.awake_ns for controller in self.controllers) < _APART_NS:
            # A new controller lets requests wait for whoever may come; what they wait in vain for is lost meanwhile.
            return
        workers = [actor] if isinstance(actor, SimWorker) else self.workers
        running = {job.number for worker in workers for engine in worker.engines for job in engine.jobs.values()}
        if not isinstance(actor, SimWorker):
            running &= {record.wish.number for record in actor.records}
        self.kept |= running

    def _silence(self, actor: SimWorker | SimClient | SimApp) -> None:
        link = actor.link if actor.alive else None
        if link is not None:
            link.network.silence(link)

    def _stutter(self) -> None:
        for network in self.networks:
            network.stutters = True

    def _overflow(self) -> None:
        client = self.world.rng.choice(self.clients)
        link = client.link
        if link is not None:
            self._keep(client)
            for network, controller in zip(self.networks, self.controllers, strict=True):
                if network is link.network:
                    controller.overflow(link.routing_id)

    def _slow(self) -> None:
        self._set_slow(slow=True)

        def fast() -> None:
            self._set_slow(slow=False)

        self.world.after(2_000, fast)

    def _set_slow(self, *, slow: bool) -> None:
        for network in self.networks:
            network.slow = slow

    def heal(self) -> None:
        """No more faults: everything that died comes back, but for clients. Half of the workers serve what they served at
        their start; the others stay with what they serve now, which may be nothing."""
        self._over = True
        self._set_slow(slow=False)
        for network in self.networks:
            network.unplugged = False
        for controller in self.controllers:
            if controller.broker is not None and controller.broker.scheduler.draining:
                controller.die()
            controller.start()
        for worker in self.workers:
            for engine in worker.engines:
                engine.hung_ns = None
            worker.changes_behind_hello = False
            worker.start()
            if self.world.rng.random() < 0.5:
                worker.serve_all()
