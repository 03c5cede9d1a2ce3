"""`BaseModelWorker` and `StepwiseModelWorker`: all that a backend has to be.

A backend knows no sockets, no registration and no beats. There are two ways to write one:

* **one request at a time**: a `BaseModelWorker` implements `generate` as an async generator of `Delta`. Deltas that
  several requests yield in the same turn of the event loop leave as one message per client, so this is fast enough for
  most engines.
* **one step at a time**: an engine that steps many requests at once is a `StepwiseModelWorker`. It implements `begin` and
  `abort`, and hands all deltas of a step to `self.steps.emit(...)` in one call; an engine that steps in a thread of its
  own calls `self.steps.emit_threadsafe(...)` there.

Whatever a backend raises, or hands over that is not what it has to be, ends the one request that it is about with a
BackendError, and is logged. Nobody else notices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol, get_args

from msgspec import structs

from zfabric.errors import FabricError, UnsupportedOperationError
from zfabric.limits import SLOTS_DEFAULT
from zfabric.wire.fields import Operation
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, GenerateRequest, OperateRequest
from zfabric.wire.tasks import (
    ClassifyRequest,
    ClassifyResult,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)

__all__ = ["OPERATIONS", "BaseModelWorker", "EngineLoad", "StepSink", "StepwiseModelWorker"]

#: What a client can ask of a model. Each is a method of the same name.
OPERATIONS: Final = frozenset(get_args(Operation)) - {"operate"}


class EngineLoad:
    """What an engine tells of itself at a beat. All fields are optional.

    Attributes:
        waiting: Requests accepted but not yet in the batch.
        kv_blocks_free: Free blocks of the cache.
        progress: A counter that moves at every engine step. An engine that has requests and does not move it for the
            stall time has hung: they go elsewhere. With None, the default, it is never taken for hung.
        slots: Room now, None for the configured number.
        gauges: Named figures for operators, 64 at most; what is not finite is left out.
    """

    __slots__ = ("gauges", "kv_blocks_free", "progress", "slots", "waiting")

    def __init__(
        self,
        *,
        waiting: int = 0,
        kv_blocks_free: int | None = None,
        progress: int | None = None,
        slots: int | None = None,
        gauges: dict[str, float] | None = None,
    ) -> None:
        self.waiting = waiting
        self.kv_blocks_free = kv_blocks_free
        self.progress = progress
        self.slots = slots
        self.gauges = gauges or {}


class StepSink(Protocol):
    """The service that runs a backend, as that sees it: where a `StepwiseModelWorker` hands over what it made, and where any
    backend tells of itself. All but the calls that say otherwise belong on the event loop's thread."""

    def emit(self, step: Iterable[tuple[str, Delta]]) -> None:
        """All deltas of one engine step, as (request_id, delta). The last of a request sets `finish_reason`
        on each of its choices and `usage` on the very last one. Deltas of requests that ended are dropped."""

    def emit_columns(
        self,
        request_ids: Sequence[str],
        token_ids: Sequence[int],
        texts: Sequence[str],
        others: Iterable[tuple[str, Delta]] = (),
    ) -> None:
        """All of one engine step, without an object for each token.

        Args:
            request_ids, token_ids, texts: Entry i of each is one token of the first choice of a request, and its text.
            others: What of this step has more, such as a request's last delta; as of `emit`. It comes after the columns.

        Raises:
            BackendError: The columns have different lengths.

        Example:
            >>> self.steps.emit_columns(running, tokens.tolist(), texts, [(request_id, Delta(finish_reason="stop"))])
        """

    def fail(self, request_id: str, error: FabricError) -> None:
        """End a request with an error."""

    def emit_threadsafe(self, step: Iterable[tuple[str, Delta]]) -> None:
        """As `emit`, from any thread. Returns at once; steps keep their order. Ignored once the worker has ended."""

    def emit_columns_threadsafe(
        self,
        request_ids: Sequence[str],
        token_ids: Sequence[int],
        texts: Sequence[str],
        others: Iterable[tuple[str, Delta]] = (),
    ) -> None:
        """As `emit_columns`, from any thread, in order with `emit_threadsafe`. The columns must not be changed afterwards."""

    def fail_threadsafe(self, request_id: str, error: FabricError) -> None:
        """As `fail`, from any thread, in order with `emit_threadsafe`."""

    def cache_changed_threadsafe(
        self,
        model: str,
        stored: Sequence[bytes] = (),
        removed: Sequence[bytes] = (),
        *,
        unit: int,
        cleared: bool = False,
    ) -> None:
        """Tell what the engine has cached of prompts, from any thread, so that dispatch by prefix is exact: see docs/dispatch.md.
        Changes are gathered for PREFIX_TELL_MS. Blocks are named by `zfabric.wire.prefixes.token_hashes`, 8 bytes each.

        Args:
            model: Whose prompts.
            stored: Blocks that are cached now, those of one prompt in its order.
            removed: Blocks that are cached no more, which is looked at before `stored`.
            unit: Tokens that the engine caches at once.
            cleared: All that was cached before is gone; looked at first.

        Example:
            >>> self.steps.cache_changed_threadsafe("m", stored=[hashes[:8], hashes[8:16]], unit=16)
        """

    def models_changed(self, models: Sequence[ModelInfo]) -> None:
        """Announce another set of models (an adapter was loaded, an upstream came or went). It may be empty.

        Raises:
            ConfigurationError: It cannot be announced: a name is taken by another backend of this worker, or a value is
                none that can be sent. What was served before still is. The log says so as well.
        """

    def log(self, event: str, **fields: object) -> None:
        """Tell the operator of something; never per request."""

    def engine_died(self, error: FabricError) -> None:
        """The engine is gone: what runs fails over to other workers, and the worker process ends with this error."""


class BaseModelWorker(ABC):
    """Base of all backends: one request at a time.

    .. code-block:: python

        class Shouting(BaseModelWorker):
            parameters = frozenset({"temperature"})

            async def load(self):
                return ModelInfo(name="shouting")

            async def generate(self, request):
                yield Delta(text=request.plain_text().upper(), finish_reason="stop")

    What a model does not announce is refused by name before its backend is asked: operations, chat messages and images by
    `ModelInfo.capabilities`, parameters by `ModelInfo.parameters`.

    Attributes:
        parameters: Names of the parameters that the backend honours: of `SamplingParams` and of `zfabric.wire.chat.OPTIONS`.
            `max_new_tokens` is always one of them, so an empty set is a backend that bounds its answers and does nothing
            else. None, the default, says nothing of it: then every parameter is handed over. `ModelInfo.parameters`
            says it per model.
        extra: Keys of a request's `extra` that the backend knows, each with its type as msgspec reads annotations: those of
            `zfabric.wire.extra.COMMON` have theirs already, and mean what is said there. None takes any key. `ModelInfo.extra`
            says it per model.
        slots: Concurrent requests by default (`--slots` overrides it).
        steps: Of an instance; bound before `load` is called.

    The command line makes a backend of the dataclass that it names `Options` (its fields become flags), or by a classmethod
    `from_arguments(argv, settings)` that parses what is left by itself, or else without arguments.
    """

    parameters: ClassVar[frozenset[str] | None] = None
    extra: ClassVar[Mapping[str, Any] | None] = {}
    slots: int = SLOTS_DEFAULT
    steps: StepSink

    @abstractmethod
    async def load(self) -> ModelInfo | Sequence[ModelInfo]:
        """Load the engine and say what it serves. Called once; long work belongs in a thread, so that signals and
        logs go on. A model without `capabilities` has the operations that the class implements. Raises whatever makes
        loading impossible; the worker process then ends with it."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Deltas of the answer, in order.

        The generator is closed (`aclose`, so GeneratorExit at its yield, or CancelledError at its await) when the
        request is cancelled, its deadline passes or its client dies. Its slot is free when it has ended, so it should
        not take long; after 10 s the log names it, and the slot counts as free all the same. The last delta of each
        choice sets `finish_reason`, and the very last one `usage`; without `usage` the tokens seen are counted. To return
        is to end: choices without a reason have ended with "stop" then. What comes after a choice's end is dropped.

        Raises:
            FabricError: Reaches the caller as it is. Anything else becomes a BackendError.
        """
        raise UnsupportedOperationError(f"{type(self).__name__} does not generate", operation="generate")

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """One vector per input. Cancelled with the request."""
        raise UnsupportedOperationError(f"{type(self).__name__} does not embed", operation="embed")

    async def embed_tokens(self, request: EmbedTokensRequest) -> EmbedTokensResult:
        """One vector per token of each input. Cancelled with the request."""
        raise UnsupportedOperationError(f"{type(self).__name__} makes no vectors of tokens", operation="embed_tokens")

    async def count_tokens(self, request: CountRequest) -> int:
        """Tokens that `generate` would see for this prompt."""
        raise UnsupportedOperationError(f"{type(self).__name__} does not count tokens", operation="count_tokens")

    async def tokenize(self, request: CountRequest) -> list[int]:
        """The tokens that `generate` would see for this prompt."""
        raise UnsupportedOperationError(f"{type(self).__name__} does not tokenize", operation="tokenize")

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """The text of tokens."""
        raise UnsupportedOperationError(f"{type(self).__name__} does not detokenize", operation="detokenize")

    async def score(self, request: ScoreRequest) -> list[float]:
        """How well each document fits the query. Cancelled with the request."""
        raise UnsupportedOperationError(f"{type(self).__name__} does not score", operation="score")

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        """The probability of each class, for each text. Cancelled with the request."""
        raise UnsupportedOperationError(f"{type(self).__name__} does not classify", operation="classify")

    async def reward(self, request: RewardRequest) -> list[list[float]]:
        """What each input is worth: one number, or one for each of its tokens or steps. Cancelled with the request."""
        raise UnsupportedOperationError(f"{type(self).__name__} gives no rewards", operation="reward")

    async def operate(self, request: OperateRequest) -> Any:
        """An operator's call, to the backend of `request.model`, or to the only one of the worker that has calls. The
        result must be MessagePack-able; arrays and numbers of NumPy and torch are sent as the numbers that they hold."""
        raise UnsupportedOperationError(
            f"{type(self).__name__} has no call {request.call!r}", operation="operate", call=request.call
        )

    async def reload(self) -> None:
        """Read configuration anew, without touching what runs; `steps.models_changed` tells of other models.

        Raises:
            FabricError: The new configuration is wrong; the old one stays.
        """

    def load_report(self) -> EngineLoad:
        """Called at each beat, from the event loop: must not block."""
        return EngineLoad()

    async def close(self) -> None:
        """Free the engine. Called once, also after a failed `load`."""

    # ── what it can ─────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def implemented(cls) -> frozenset[str]:
        """Operations that this class can be asked for: the methods that it overrides."""
        return frozenset(name for name in OPERATIONS if getattr(cls, name) is not getattr(BaseModelWorker, name))

    def announcement(self, info: ModelInfo) -> ModelInfo:
        """What is announced of a model that `load` or `steps.models_changed` named, in full. A class that does part of the
        work for others that derive from it adds here what it does."""
        parameters = self.parameters if info.parameters is None else info.parameters
        capabilities = list(info.capabilities or sorted(self.implemented()))
        return structs.replace(
            info,
            capabilities=capabilities,
            parameters=None if parameters is None else sorted({*parameters, "max_new_tokens"}),
            extra=self.extra_of(info) if "generate" in capabilities else [],
        )

    def extra_of(self, info: ModelInfo) -> list[str] | None:
        """Keys of `extra` that a model is announced with: its own, or else all that the class knows."""
        if info.extra is None or info.extra:
            return info.extra
        return None if self.extra is None else sorted(self.extra)


class StepwiseModelWorker(BaseModelWorker):
    """Base of backends whose engine steps many requests at once: all deltas of a step leave in one call.

    .. code-block:: python

        class Engine(StepwiseModelWorker):
            async def load(self):
                self.engine = MyEngine(on_step=self.on_step)
                return ModelInfo(name="mine")

            def begin(self, request):
                self.engine.add(request.request_id, request.plain_text(), request.sampling)

            def abort(self, request_id):
                self.engine.remove(request_id)

            def on_step(self, made):  # in the engine's own thread
                self.steps.emit_threadsafe((name, Delta(text=text, token_ids=[token])) for name, token, text in made)

    Everything but text is asked for one request at a time, as of any backend; `generate` is not called.
    """

    @abstractmethod
    def begin(self, request: GenerateRequest) -> None:
        """Start a request whose deltas will come through `steps.emit`. Must not block."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Stop a request begun before; no more is wanted of it. Must not block. Unknown names are ignored.

        Its slot counts as free when this returns: a request that is begun later must find room, at the latest when the
        engine's running step is over.
        """

    @classmethod
    def implemented(cls) -> frozenset[str]:
        return super().implemented() | {"generate"}
