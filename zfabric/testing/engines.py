"""Backends that say what their prompts demand: one that steps all of its requests at once, and one that generates each."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

from zfabric.errors import BackendError, UnsupportedOperationError
from zfabric.testing.catalogue import EngineSpec, names_of
from zfabric.testing.records import BROKEN, Violation, token_id, token_text
from zfabric.testing.sockets import ProcessLoop
from zfabric.testing.tasks import TASKS
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import AnyRequest, CountRequest, Delta, GenerateRequest, OperateRequest, TextRequest, Usage
from zfabric.wire.tasks import (
    ClassifyRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    EmbedTokensRequest,
    RewardRequest,
    ScoreRequest,
)
from zfabric.worker.base import BaseModelWorker, EngineLoad, StepwiseModelWorker

#: An operation that is no generation takes so long, in milliseconds, at least and at most.
_UNARY_MS: Final = (1.0, 60.0)
#: A generator that was told to stop needs so long for it, in milliseconds, at most.
_STOP_MS: Final = 30.0
#: How often a generator looks whether its engine moves again.
_HUNG_S: Final = 0.05


class Host(Protocol):
    """The process that an engine is in."""

    name: str
    slots: int
    loop: ProcessLoop

    def check_slots(self) -> None: ...


class Job:
    """One request in an engine's hands."""

    __slots__ = (
        "begun_ns",
        "breaks_at",
        "count",
        "draw",
        "first_ns",
        "number",
        "operation",
        "owed",
        "position",
        "values",
    )

    def __init__(self, operation: Operation, request: AnyRequest, now_ns: int) -> None:
        self.operation = operation
        prompt = TASKS[operation].prompt(request) if operation in TASKS else _prompt_of(request)
        number, breaks, values, *_ = [*prompt.split("/"), "", ""]
        self.number = int(number) if number.isdecimal() else 0
        self.breaks_at = int(breaks) if breaks.isdecimal() else None
        self.values = int(values) if values.isdecimal() else 1
        self.begun_ns = self.first_ns = now_ns
        self.position = self.count = self.draw = 0
        #: Text of the tokens that its reader has, and that its reader has not.
        self.owed = ""


class SimBackend(BaseModelWorker):
    """What both kinds share.

    Args:
        host: The process.
        spec: What it serves, and how.
    """

    def __init__(self, host: Host, spec: EngineSpec) -> None:
        self.host = host
        self.spec = spec
        self.models: list[ModelInfo] = list(spec.models)
        #: What it served before its last announcement: requests for that may still be on their way.
        self.former: list[ModelInfo] = []
        self.slots = host.slots
        #: Requests that it works on, also while they are being stopped.
        self.jobs: dict[str, Job] = {}
        self.hung_ns: int | None = None
        self.moves = 0

    async def load(self) -> list[ModelInfo]:
        return self.models

    def load_report(self) -> EngineLoad:
        gauges: dict[str, Any] = {"cache": object()} if self.spec.odd_gauges else {"cache": 0.5}
        return EngineLoad(progress=self.moves if self.spec.reports else None, gauges=gauges)

    def announce(self, models: list[ModelInfo]) -> None:
        """Serve others from now on."""
        self.steps.models_changed(models)
        self.former, self.models = self.models, models

    # ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def open_job(self, operation: Operation, request: AnyRequest) -> Job:
        """Take a request."""
        world = self.host.loop.world
        job = Job(operation, request, world.now_ns)
        self._check_able(operation, request)
        if isinstance(request, GenerateRequest):
            job.position = len(request.resume_token_ids)
            job.count = request.sampling.max_new_tokens or 1
            sampling = request.sampling
            if not sampling.greedy:
                job.draw = (sampling.seed if sampling.seed is not None else world.rng.getrandbits(63)) % 2**40
            text = "".join([token_text(job.number, token) for token in request.resume_token_ids])
            job.owed = text[request.resume_characters :]
            if self.spec.first_ms and world.rng.random() < 0.2:
                job.first_ns += int(self.spec.first_ms * 1e6)
        self.jobs[request.request_id] = job
        self.host.check_slots()
        return job

    def _check_able(self, operation: str, request: AnyRequest) -> None:
        """As a backend refuses what it cannot do."""
        for info in self.models:
            if request.model in (info.name, *info.aliases) and operation != "operate":
                if operation not in info.capabilities:
                    raise UnsupportedOperationError(f"{self.host.name!r} does not {operation} with {info.name!r}")
                resumed = isinstance(request, GenerateRequest) and request.resume_token_ids
                if resumed and "resume" not in info.capabilities:
                    if any(former.name == info.name and "resume" in former.capabilities for former in self.former):
                        raise UnsupportedOperationError(
                            f"{self.host.name!r} does not go on with {info.name!r} any more"
                        )
                    self._violated(f"worker {self.host.name} is to go on in mid-stream with {info.name}, and cannot")

    def _violated(self, what: str) -> None:
        """The service would take it for the engine's failure, so the world is told."""
        self.host.loop.world.broken = Violation(what)

    def delta_of(self, job: Job) -> Delta:
        """What one step adds to an answer.

        Raises:
            BackendError: The engine fails here.
        """
        first = job.position
        end = min(first + self.spec.burst, job.count)
        token_ids = [token_id(job.draw, position) for position in range(first, end)]
        text = job.owed + "".join([token_text(job.number, token) for token in token_ids])
        if job.breaks_at is not None and end > job.breaks_at:
            if job.breaks_at % 2:
                error = BackendError(f"cuda error {BROKEN}")
                # Names that are parameters elsewhere, and a value that cannot be sent.
                error.details = {"message": "again", "self": 1, "address": object()}  # type: ignore[dict-item]
                raise error
            text += BROKEN
        delta = Delta(text=text, token_ids=token_ids)
        job.position, job.owed = end, ""
        if end >= job.count:
            delta.finish_reason = "length"
            delta.usage = Usage(1, end)
        return delta

    # ── unary operations ────────────────────────────────────────────────────────────────────────────────────────────

    async def embed(self, request: EmbedRequest) -> Any:
        return await self._answer("embed", request)

    async def count_tokens(self, request: CountRequest) -> Any:
        return await self._answer("count_tokens", request)

    async def tokenize(self, request: CountRequest) -> Any:
        return await self._answer("tokenize", request)

    async def detokenize(self, request: DetokenizeRequest) -> Any:
        return await self._answer("detokenize", request)

    async def score(self, request: ScoreRequest) -> Any:
        return await self._answer("score", request)

    async def classify(self, request: ClassifyRequest) -> Any:
        return await self._answer("classify", request)

    async def reward(self, request: RewardRequest) -> Any:
        return await self._answer("reward", request)

    async def embed_tokens(self, request: EmbedTokensRequest) -> Any:
        return await self._answer("embed_tokens", request)

    async def operate(self, request: OperateRequest) -> Any:
        return await self._answer("operate", request)

    async def _answer(self, operation: Operation, request: AnyRequest) -> Any:
        job = self.open_job(operation, request)
        # Of the moment when the call came: the engine may serve others when it ends.
        names = sorted(names_of(self.models))
        try:
            await self._work(self.host.loop.world.rng.uniform(*_UNARY_MS))
        finally:
            self.jobs.pop(request.request_id, None)
        self.moves += 1
        if job.breaks_at is not None:
            return self._broken_result(operation, job.breaks_at)
        if operation == "embed":
            data = struct.pack("<f", job.number) * job.values
            return EmbedResult(rows=1, dimensions=job.values, data=data)
        if operation == "count_tokens":
            return job.number
        if operation in TASKS:
            return TASKS[operation].made(job.number)
        return {"number": job.number, "worker": self.host.name, "names": names}

    def _broken_result(self, operation: str, how: int) -> Any:
        """What cannot be encoded, or what its caller could not read. Raises: RuntimeError, as engines do."""
        if how % 2:
            raise RuntimeError(f"cuda error {BROKEN}")
        if how and operation == "embed":
            return EmbedResult(rows=1, dimensions=2, data=b"short")
        if how and operation not in ("embed", "embed_tokens", "operate"):
            return 7 if operation == "detokenize" else "many"
        return {"tensor": object()}

    async def _work(self, milliseconds: float) -> None:
        await asyncio.sleep(milliseconds / 1_000)
        while self.hung_ns is not None:  # noqa: ASYNC110 — what hangs waits for nothing
            await asyncio.sleep(_HUNG_S)


class SteppedBackend(SimBackend, StepwiseModelWorker):
    """One token a step for each of its requests, all handed over in one call."""

    def __init__(self, host: Host, spec: EngineSpec) -> None:
        super().__init__(host, spec)
        self._scheduled = False

    def begin(self, request: GenerateRequest) -> None:
        self.open_job("generate", request)
        self._schedule()

    def abort(self, request_id: str) -> None:
        self.jobs.pop(request_id, None)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            loop = self.host.loop
            loop.call_later(self.spec.step_ms * loop.world.rng.uniform(0.5, 1.5) / 1_000, self._wake)

    def _wake(self) -> None:
        self._scheduled = False
        if any(job.operation == "generate" for job in self.jobs.values()):
            if self.hung_ns is None:
                self._step()
            self._schedule()

    def _step(self) -> None:
        now_ns = self.host.loop.world.now_ns
        deltas: list[tuple[str, Delta]] = []
        for request_id, job in list(self.jobs.items()):
            if job.first_ns > now_ns or job.operation != "generate":
                continue
            try:
                delta = self.delta_of(job)
            except BackendError as error:
                del self.jobs[request_id]
                self.steps.fail(request_id, error)
                continue
            if delta.finish_reason is not None:
                del self.jobs[request_id]
            deltas.append((request_id, delta))
        self.moves += 1
        self.steps.emit(deltas)


class GeneratingBackend(SimBackend):
    """An async generator for each request, which takes a moment to stop."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        job = self.open_job("generate", request)
        world = self.host.loop.world
        try:
            if job.first_ns > job.begun_ns:
                await self._work((job.first_ns - job.begun_ns) / 1e6)
            while job.position < job.count:
                await self._work(self.spec.step_ms * world.rng.uniform(0.5, 1.5))
                self.moves += 1
                yield self.delta_of(job)
        finally:
            try:
                if job.position < job.count:
                    await asyncio.sleep(world.rng.choice([0, _STOP_MS]) / 1_000)
            finally:
                self.jobs.pop(request.request_id, None)


def make_backend(host: Host, spec: EngineSpec) -> SimBackend:
    """The backend of a spec."""
    return SteppedBackend(host, spec) if spec.stepped else GeneratingBackend(host, spec)


def _prompt_of(request: AnyRequest) -> str:
    if isinstance(request, EmbedRequest):
        return str(request.inputs[0])
    if isinstance(request, OperateRequest):
        return str(request.arguments.get("prompt"))
    if isinstance(request, (TextRequest, CountRequest)):
        return str(request.prompt)
    raise AssertionError(f"no plan has a {type(request).__name__}")
