"""A worker's process: the library's own worker service, with simulated engines, on a simulated loop."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from typing import Any, Final

from zfabric.core.worker.sessions import WorkerSessions
from zfabric.errors import ConfigurationError
from zfabric.testing.catalogue import EngineSpec, Habits, names_of, redraw
from zfabric.testing.engines import SimBackend, make_backend
from zfabric.testing.network import Link, Network
from zfabric.testing.records import Violation
from zfabric.testing.sockets import ProcessLoop, SimDealer
from zfabric.testing.world import MILLISECOND, World
from zfabric.wire import codec, kinds
from zfabric.wire.messages import Carried, ModelInfo, WorkerHello
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService

#: Time in which a controller hears of what its worker has from a former session.
_TOLD_MS: Final = 200
#: How a worker names its requests.
_REQUEST_ID: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+-\d+")


class SimWorker:
    """A worker that can be killed, stopped in its tracks, drained, and serve other models at run time."""

    def __init__(self, world: World, network: Network, name: str, habits: Habits, specs: list[EngineSpec]) -> None:
        self.world = world
        self.networks = network.all
        self.name = name
        self.habits = habits
        self.slots = habits.slots
        self.specs = specs
        self.alive = False
        self.died_ns: int | None = None
        self.dealers: list[SimDealer] = []
        self.engines: list[SimBackend] = []
        self.registered_ns = 0
        #: When it goes on, or went on, after it was frozen: what moved before is told only then.
        self.thawed_ns = 0
        #: Until when a drain lets running requests finish.
        self.drain_until_ns = 0
        #: The shortest limit of an operator's call to drain, which may come late, to the next process of this name.
        self._queried_ms: int | None = None
        #: Its latest HELLOs, and when a session began of which a HELLO offered slots, and did not tell all that took them.
        self._hellos: list[tuple[int, WorkerHello]] = []
        self._untold_ns: int | None = None
        #: Whether it changes its models while its next HELLO is on its way.
        self.changes_behind_hello = False
        self.start()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """A new process under the same name."""
        if self.alive:
            return
        self.alive = True
        self.died_ns = None
        self.drain_until_ns = 0
        self._started_ns = self.world.now_ns
        self.loop = ProcessLoop(self.world, self)  # type: ignore[abstract]
        self.engines = [make_backend(self, spec) for spec in self.specs]
        self.dealers = []
        endpoint = ",".join(network.endpoint for network in self.networks)
        config = WorkerConfig(endpoint=endpoint, name=self.name, credentials=None, **asdict(self.habits))
        self.service = WorkerService(self.engines, config, log=self._log)
        self.loop.create_task(self._run(self.service))

    async def _run(self, service: WorkerService) -> None:
        try:
            await service.run()
        except asyncio.CancelledError:
            return
        self._ended()

    def _ended(self) -> None:
        """It was drained. Nothing that could have finished in time was handed back."""
        now_ns = self.world.now_ns
        handed_back = sum(dealer.handed_back for dealer in self.dealers)
        until_ns = self.drain_until_ns
        if self._queried_ms is not None:
            until_ns = min(until_ns, self._started_ns + self._queried_ms * MILLISECOND)
        if handed_back and now_ns < until_ns:
            left_ms = (until_ns - now_ns) // MILLISECOND
            raise Violation(
                f"worker {self.name} handed {handed_back} requests back {left_ms} ms before its drain's limit"
            )
        self.alive = False
        self.died_ns = now_ns
        self.world.after(self.world.rng.choice([50, 1_000]), self.start)

    def die(self) -> None:
        """SIGKILL."""
        if self.alive:
            self.alive = False
            self.died_ns = self.world.now_ns
            for dealer in self.dealers:
                dealer.kill()
            self.loop.kill()
            self.engines = []

    def freeze(self, milliseconds: float) -> None:
        """SIGSTOP, and SIGCONT later. The kernel keeps the connection; what arrives waits."""
        if self.alive:
            self.thawed_ns = max(self.thawed_ns, self.world.now_ns + int(milliseconds * 1e6))
            self.loop.freeze(self.world.now_ns + int(milliseconds * 1e6))

    @property
    def frozen(self) -> bool:
        return self.loop.frozen

    def drain(self, milliseconds: int) -> None:
        """As a stop hook does, and then the signal: asked twice, done once."""
        if self.alive and not self.frozen:
            self.is_to_drain(milliseconds)
            self.loop.create_task(self.service.drain(milliseconds))
            self.loop.call_later(0.02, lambda: self.loop.create_task(self.service.drain(milliseconds)))

    def is_queried_to_drain(self, milliseconds: int) -> None:
        """An operator asks the controller for it."""
        self.is_to_drain(milliseconds)
        self._queried_ms = min(self._queried_ms or milliseconds, milliseconds)

    def is_to_drain(self, milliseconds: int) -> None:
        """Somebody asks for it; of several limits the nearest holds."""
        until_ns = self.world.now_ns + milliseconds * MILLISECOND
        self.drain_until_ns = min(self.drain_until_ns or until_ns, until_ns)

    # ── what it serves ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def models(self) -> list[ModelInfo]:
        """What it serves now."""
        return [info for engine in self.engines for info in engine.models]

    def reannounce(self) -> None:
        """One engine serves other models from now on; what runs, runs on. A set that collides with another engine's is
        refused, and changes nothing."""
        if self.alive and not self.frozen and self.dealers:
            engine = self.world.rng.choice(self.engines)
            self.loop.call_soon(self._change, engine, redraw(self.world.rng, engine.models))

    def serve_all(self) -> None:
        """Back to what it served at its start."""
        for engine in self.engines:
            if engine.models != engine.spec.models:
                self.loop.call_soon(self._change, engine, list(engine.spec.models))

    def _change(self, engine: SimBackend, models: list[ModelInfo]) -> None:
        try:
            engine.announce(models)
        except ConfigurationError:
            return

    # ── the process ─────────────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, dealer: SimDealer) -> None:
        """Its socket was made."""
        self.dealers.append(dealer)
        dealer.on_sent = self._sent

    def _sent(self, header: bytes) -> None:
        if header[0] != kinds.WORKER_HELLO:
            return
        now_ns = self.world.now_ns
        self._hellos = [(at_ns, hello) for at_ns, hello in self._hellos if now_ns - at_ns < _TOLD_MS * MILLISECOND]
        self._hellos.append((now_ns, codec.unpack_control(header)))
        if self.changes_behind_hello:
            self.changes_behind_hello = False
            self.reannounce()

    @property
    def link(self) -> Link | None:
        links = [dealer.link for dealer in self.dealers if dealer.link is not None]
        return links[0] if len(links) == 1 else self.world.rng.choice(links) if links else None

    @property
    def session(self) -> WorkerSessions:
        """Those of its service, as if there were one."""
        return self.service._sessions

    def _log(self, event: str, **fields: object) -> None:
        if event == "registered":
            self.registered_ns = self.world.now_ns
            carried = _keys(self.session.carried())
            if any(hello.load.slots and carried - _keys(hello.carried) for _, hello in self._hellos):
                self._untold_ns = self.world.now_ns
        elif event in ("bad_message", "fault"):
            self.world.broken = Violation(f"worker {self.name} logs {event}: {fields}")

    # ── checks ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_slots(self) -> None:
        """No more than there is room for. What hangs in one engine takes no other's room.

        A HELLO on a standing session that the controller has ended opens the next one. It could not tell of what was still
        on its way to the worker, so that may have one too many until the controller has heard of it.
        """
        if self._untold_ns is not None and self.world.now_ns - self._untold_ns < _TOLD_MS * MILLISECOND:
            return
        moving = [engine for engine in self.engines if engine.hung_ns is None]
        jobs = [
            job
            for engine in moving
            for request_id, job in engine.jobs.items()
            if job.operation != "operate" and not self._stops(request_id)
        ]
        if len(jobs) > self.slots:
            self.world.broken = Violation(f"worker {self.name} runs {len(jobs)} requests with {self.slots} slots")

    def _stops(self, request_id: str) -> bool:
        """Whether it is to stop, and the worker has more controllers than the one that knows."""
        sessions = list(self.session)
        return len(sessions) > 1 and any(request_id in session.stopping for session in sessions)

    def check_hung(self, limit_ms: float, since_ns: int) -> None:
        """Nobody's request stays with an engine that hangs, as long as the fabric could know of it."""
        now_ns = self.world.now_ns
        if not self.habits.beats:
            return
        for engine in self.engines:
            if engine.hung_ns is None or not engine.spec.reports:
                continue
            for request_id, job in engine.jobs.items():
                hung_ms = (
                    now_ns - max(engine.hung_ns, job.begun_ns, self.registered_ns, self.thawed_ns, since_ns)
                ) // MILLISECOND
                # Operators' calls have time limits of their own.
                if hung_ms > limit_ms and request_id in self.session.streams and job.operation != "operate":
                    raise Violation(
                        f"request {job.number} is with a hung engine of worker {self.name} for {hung_ms} ms"
                    )

    def held(self) -> dict[str, int]:
        """Streams that hold back units although the reader's credit allows some, and where they stand."""
        return {
            request_id: stream.next
            for request_id, stream in self.session.streams.items()
            if stream.client is not None
            and stream.held_units >= self.habits.stream_interval
            and stream.window > stream.next
        }

    def check_rest(self, strangers: set[int]) -> None:
        """Nothing is left of requests that have ended, in any table of the service or the session.

        Args:
            strangers: Instances of clients whose requests may still run.
        """
        names, served = sorted(names_of(self.models)), self.service._served.names
        if names != served:
            raise Violation(f"the engines of worker {self.name} serve {names}, and it takes requests for {served}")
        jobs = [job.number for engine in self.engines for job in engine.jobs.values() if job.number]
        if jobs:
            raise Violation(f"worker {self.name} works on {jobs} at rest")
        for owner in (self.service, *vars(self.service).values()):
            if type(owner).__module__.startswith("zfabric."):
                for name, table in _tables_of(owner).items():
                    for key in _request_ids(table):
                        if name != "_kept" and int(key.partition("-")[0], 16) not in strangers:
                            raise Violation(f"worker {self.name} keeps {key} in {name} at rest")


def _keys(carried: list[Carried]) -> set[tuple[int, int, int]]:
    return {(line.instance, line.request, line.attempt) for line in carried}


def _tables_of(owner: Any) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})


def _request_ids(table: Any) -> list[str]:
    if not isinstance(table, (dict, set, list)):
        return []
    return [key for key in table if isinstance(key, str) and _REQUEST_ID.fullmatch(key)]
