"""A worker session with simulated engines: what a worker's process is to the fabric."""

from __future__ import annotations

import random
from typing import Final

from zfabric.core.access import EVERYBODY
from zfabric.core.worker_session import Begin, DrainAsked, Order, Refused, Stop, WorkerSession
from zfabric.errors import BackendError, FabricError, UnknownModelError, UnsupportedOperationError
from zfabric.testing.catalogue import EngineSpec, names_of, redraw
from zfabric.testing.network import Link, Network
from zfabric.testing.records import BROKEN, Violation, token_text
from zfabric.testing.world import MILLISECOND, Alarm, World
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import AnyRequest, Delta, GenerateRequest, Usage

#: An operation that is no generation takes so long, in milliseconds, at least and at most.
_UNARY_MS: Final = (1.0, 60.0)


class Job:
    """One request in an engine's hands."""

    __slots__ = ("begun_ns", "breaks_at", "count", "draw", "first_ns", "number", "position", "request")

    def __init__(self, request: AnyRequest, now_ns: int) -> None:
        self.request = request
        number, _, rest = _prompt_of(request).partition("/")
        breaks, _, _ = rest.partition("/")
        self.number = int(number) if number.isdecimal() else 0
        self.breaks_at = int(breaks) if breaks.isdecimal() else None
        self.begun_ns = self.first_ns = now_ns
        self.position = self.count = self.draw = 0


class SimEngine:
    """Says what its prompts demand, some tokens a step for each request."""

    def __init__(self, worker: SimWorker, spec: EngineSpec) -> None:
        self.worker = worker
        self.spec = spec
        self.models: list[ModelInfo] = list(spec.models)
        self.jobs: dict[str, Job] = {}
        self.hung_ns: int | None = None
        self.steps = 0
        self._scheduled = False

    def begin(self, order: Begin) -> None:
        """Take a request."""
        world = self.worker.world
        job = Job(order.request, world.now_ns)
        request = order.request
        if isinstance(request, GenerateRequest):
            job.position = len(request.resume_token_ids)
            job.count = request.sampling.max_new_tokens or 1
            job.draw = self._draw(request, world.rng)
            if self.spec.first_ms and world.rng.random() < 0.2:
                job.first_ns += int(self.spec.first_ms * 1e6)
        else:
            job.first_ns += int(world.rng.uniform(*_UNARY_MS) * 1e6)
        self.jobs[order.request_id] = job
        self._schedule()

    def _draw(self, request: GenerateRequest, rng: random.Random) -> int:
        sampling = request.sampling
        if sampling.greedy:
            return 0
        return sampling.seed if sampling.seed is not None else rng.randrange(1, 2**40)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            world = self.worker.world
            world.after(self.spec.step_ms * world.rng.uniform(0.5, 1.5), self._wake)

    def _wake(self) -> None:
        self._scheduled = False
        worker = self.worker
        if not self.jobs or not worker.alive or self not in worker.engines:
            return
        if not worker.frozen and self.hung_ns is None:
            self._step()
            worker.session.flush()
            worker.after()
        self._schedule()

    def _step(self) -> None:
        """One step of all requests."""
        worker = self.worker
        now_ns = worker.world.now_ns
        deltas: list[tuple[str, Delta]] = []
        for request_id, job in list(self.jobs.items()):
            if job.first_ns > now_ns:
                continue
            if not isinstance(job.request, GenerateRequest):
                del self.jobs[request_id]
                self._answer(request_id, job)
            elif job.breaks_at is not None and job.position >= job.breaks_at and job.breaks_at % 2:
                del self.jobs[request_id]
                worker.session.fail(request_id, BackendError(f"cuda error {BROKEN}"), now_ns)
            else:
                deltas.append((request_id, self._delta(request_id, job)))
        self.steps += 1
        worker.units += len(deltas)
        worker.session.emit(deltas, now_ns)

    def _delta(self, request_id: str, job: Job) -> Delta:
        first = job.position
        end = min(first + self.spec.burst, job.count)
        text = "".join([token_text(job.number, job.draw, position) for position in range(first, end)])
        delta = Delta(text=text, token_ids=list(range(first, end)))
        if job.breaks_at is not None and end > job.breaks_at:
            delta.text += BROKEN
        job.position = end
        if end >= job.count:
            delta.finish_reason = "length"
            delta.usage = Usage(1, end)
            del self.jobs[request_id]
        return delta

    def _answer(self, request_id: str, job: Job) -> None:
        session, now_ns = self.worker.session, self.worker.world.now_ns
        operation = _OPERATION_OF[type(job.request).__name__]
        result: dict[str, object] = {
            "operation": operation,
            "number": job.number,
            "worker": self.worker.name,
            "names": sorted(names_of(self.models)),
        }
        if job.breaks_at is None:
            session.succeed(request_id, result, now_ns)
        elif job.breaks_at % 2:
            session.fail(request_id, BackendError(f"cuda error {BROKEN}"), now_ns)
        else:
            session.succeed(request_id, {**result, "tensor": object()}, now_ns)


class SimWorker:
    """A worker's process. Its engines' requests stop when it does."""

    honest: Final = True
    grant: Final = EVERYBODY

    def __init__(self, world: World, network: Network, name: str, slots: int, specs: list[EngineSpec]) -> None:
        self.world = world
        self.network = network
        self.name = name
        self.slots = slots
        self.specs = specs
        self.alive = False
        self.died_ns: int | None = None
        self.link: Link | None = None
        self.frozen_until_ns = 0
        self.engines: list[SimEngine] = []
        self.units = 0
        self.registered_ns = 0
        self._held: list[tuple[bytes, bytes]] = []
        self.start()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """A new process under the same name."""
        if self.alive:
            return
        self.alive = True
        self.died_ns = None
        self.engines = [SimEngine(self, spec) for spec in self.specs]
        self.units = 0
        self._held = []
        self.frozen_until_ns = 0
        self.session = WorkerSession(name=self.name, instance=self.world.rng.getrandbits(63), rng=self.world.rng)
        self.session.load.slots = self.slots
        self._announce()
        self._alarm = Alarm(self.world, self._tick)
        self.network.connect(self)

    def die(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.died_ns = self.world.now_ns
        self.engines = []
        link, self.link = self.link, None
        if link is not None:
            self.network.cut(link, peer_alive=False)

    def freeze(self, milliseconds: float) -> None:
        """SIGSTOP, and SIGCONT later. The kernel keeps the connection; what arrives waits."""
        self.frozen_until_ns = self.world.now_ns + int(milliseconds * 1e6)
        self.world.after(milliseconds, self._thaw)

    @property
    def frozen(self) -> bool:
        return self.world.now_ns < self.frozen_until_ns

    def _thaw(self) -> None:
        if self.alive and not self.frozen:
            held, self._held = self._held, []
            for header, body in held:
                self.link_message(header, body)
            self._tick()

    # ── what it serves ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def models(self) -> list[ModelInfo]:
        """What it serves now."""
        return [info for engine in self.engines for info in engine.models]

    def reannounce(self) -> None:
        """One engine serves other models from now on; what runs, runs on."""
        if self.alive and not self.frozen:
            rng = self.world.rng
            engine = rng.choice(self.engines)
            models = redraw(rng, engine.models)
            taken = names_of([info for other in self.engines if other is not engine for info in other.models])
            if not names_of(models) & taken:
                engine.models = models
                self._announce()
                self.after()

    def serve_all(self) -> None:
        """Back to what it served at its start."""
        if self.alive and any(engine.models != engine.spec.models for engine in self.engines):
            for engine in self.engines:
                engine.models = list(engine.spec.models)
            self._announce()
            self.after()

    def _announce(self) -> None:
        self.session.announce(self.models, self.world.now_ns)

    # ── link ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self, link: Link) -> None:
        if not self.alive:
            self.network.cut(link, peer_alive=False)
            return
        if self.frozen:
            self.world.at(self.frozen_until_ns, lambda: self.link_up(link) if link.alive else None)
            return
        self.link = link
        self.session.connected(self.world.now_ns)
        self.after()

    def link_down(self, link: Link) -> None:
        if link is self.link:
            self.link = None
            self._held.clear()
            self.session.disconnected()

    def link_message(self, header: bytes, body: bytes) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._held.append((header, body))
            return
        registered = self.session.registered
        for order in self.session.receive(header, body, self.world.now_ns):
            self._obey(order)
        if self.session.registered and not registered:
            self.registered_ns = self.world.now_ns
        self.after()

    # ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _obey(self, order: Order) -> None:
        if isinstance(order, Begin):
            self._begin(order)
        elif isinstance(order, Stop):
            for engine in self.engines:
                engine.jobs.pop(order.request_id, None)
        else:
            if isinstance(order, DrainAsked):
                raise Violation(f"worker {self.name} is asked to drain by nobody")
            assert not isinstance(order, Refused) or order.error.retryable

    def _begin(self, order: Begin) -> None:
        try:
            engine = self._engine_of(order.request.model)
            self._check_operation(engine, order)
        except FabricError as error:
            self.session.fail(order.request_id, error, self.world.now_ns)
            self.session.flush()
            return
        engine.begin(order)
        self._check_slots()

    def _engine_of(self, model: str) -> SimEngine:
        if not model:
            return self.engines[0]
        for engine in self.engines:
            if model in names_of(engine.models):
                return engine
        raise UnknownModelError(f"worker {self.name!r} does not serve {model!r}", model=model)

    def _check_operation(self, engine: SimEngine, order: Begin) -> None:
        """As a backend refuses what it cannot do."""
        for info in engine.models:
            if order.request.model in (info.name, *info.aliases) and order.operation != "operate":
                if order.operation not in info.capabilities:
                    raise UnsupportedOperationError(
                        f"worker {self.name!r} does not {order.operation} with {info.name!r}"
                    )
                resumed = isinstance(order.request, GenerateRequest) and order.request.resume_token_ids
                if resumed and "resume" not in info.capabilities:
                    raise Violation(f"worker {self.name} is to go on in mid-stream with {info.name}, and cannot")

    def _check_slots(self) -> None:
        """No more than there is room for, in all and of each model."""
        jobs = [job for engine in self.engines for job in engine.jobs.values() if _needs_slot(job)]
        if len(jobs) > self.slots:
            raise Violation(f"worker {self.name} runs {len(jobs)} requests with {self.slots} slots")

    # ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _report(self) -> None:
        """What the engines tell at a beat."""
        load = self.session.load
        load.engines = [engine.steps if engine.spec.reports else None for engine in self.engines]
        steps = [engine.steps for engine in self.engines if engine.spec.reports]
        load.progress = sum(steps) if len(steps) == len(self.engines) else self.units

    def _tick(self) -> None:
        if self.alive and not self.frozen:
            self._report()
            self.session.tick(self.world.now_ns)
            self.after()

    def after(self) -> None:
        """Send what the session wants sent."""
        outbox, self.session.outbox = self.session.outbox, []
        if self.link is not None:
            for header, body in outbox:
                self.link.to_hub(header, body)
        self._alarm.arm(self.session.timers.next_ns())

    def check_hung(self, limit_ms: float, since_ns: int) -> None:
        """Nobody's request stays with an engine that hangs, as long as the fabric could know of it."""
        now_ns = self.world.now_ns
        for engine in self.engines:
            if engine.hung_ns is None or not engine.spec.reports:
                continue
            for job in engine.jobs.values():
                hung_ms = (now_ns - max(engine.hung_ns, job.begun_ns, self.registered_ns, since_ns)) // MILLISECOND
                if hung_ms > limit_ms:
                    raise Violation(
                        f"request {job.number} is with a hung engine of worker {self.name} for {hung_ms} ms"
                    )

    def check_held(self) -> dict[str, int]:
        """Streams that hold back units although the reader's credit allows some, and where they stand."""
        return {
            request_id: stream.next
            for request_id, stream in self.session.streams.items()
            if stream.client is not None and stream.held_units and stream.window > stream.next
        }


_OPERATION_OF: Final = {"EmbedRequest": "embed", "CountRequest": "count_tokens", "OperateRequest": "operate"}


def _needs_slot(job: Job) -> bool:
    return type(job.request).__name__ != "OperateRequest"


def _prompt_of(request: AnyRequest) -> str:
    prompt = getattr(request, "prompt", None)
    if prompt is None:
        prompt = getattr(request, "inputs", [None])[0]
    if prompt is None:
        prompt = getattr(request, "arguments", {}).get("prompt")
    return str(prompt)
