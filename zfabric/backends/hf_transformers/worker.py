"""ModelWorker: a PyTorch model of transformers on the fabric, batched continuously."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import structs

from zfabric.backends.front.adapter_directory import AdapterDirectory
from zfabric.backends.front.adapters import adapter_details
from zfabric.backends.front.bounds import known_tokens
from zfabric.backends.front.cached import CacheTranslator
from zfabric.backends.front.embed_inputs import cosines
from zfabric.backends.front.weight_files import WeightsDirectory
from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.setup.model_details import (
    cache_told,
    hearing_told,
    speculation_told,
    vectors_told,
)
from zfabric.errors import EngineStalledError, FabricError, UnsupportedOperationError
from zfabric.wire.chat import OPTIONS
from zfabric.wire.extra import COMMON
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
from zfabric.worker.base import EngineLoad, StepwiseModelWorker

if TYPE_CHECKING:
    from zfabric.backends.hf_transformers.loading.model_loader import Loaded
    from zfabric.backends.hf_transformers.operations import Operations
    from zfabric.backends.hf_transformers.pooling.classifying import Classifier
    from zfabric.backends.hf_transformers.pooling.embedding import Embedder, Pieces
    from zfabric.backends.hf_transformers.request.sequence import Answer
    from zfabric.backends.hf_transformers.scheduling.engine import Engine
    from zfabric.backends.hf_transformers.setup.assembly import Assembled

T = TypeVar("T")

#: The engine's thread holds the interpreter between two tensor operations; beats and cancels must get it quickly.
_SWITCH_INTERVAL_S: Final = 0.0005
#: Often enough to say so soon after the limit, and next to no work.
_WATCH_INTERVAL_S: Final = 1.0


#: Keys of `extra` that models of a kind do not know; what is said of decoders holds for all others.
_OTHERS_EXTRA: Final = {
    "causal": {"forced_bos_token_id", "language", "task"},
    "paired": {"language", "task"},
    "speech": {"forced_bos_token_id"},
}


class ModelWorker(StepwiseModelWorker):
    """Serves one model: text from causal language models, vectors from encoders and from those as well, classes, scores and
    rewards from models with a head that judges texts."""

    parameters = frozenset(
        {
            "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "n",
            "best_of", "use_beam_search", "logprobs", "prompt_logprobs", "echo", "logit_bias", "bad_words", "truncate_prompt",
            "skip_special_tokens", "guided_json", "guided_regex", "guided_choice", "guided_grammar", *OPTIONS,
        }
    )  # fmt: skip
    extra = {
        name: COMMON[name]
        for name in (
            "allowed_token_ids", "cache_salt", "detokenize", "forced_bos_token_id", "include_stop", "language", "task",
        )
    }  # fmt: skip
    Options = TransformersOptions

    def __init__(self, options: TransformersOptions) -> None:
        self.options = options
        self._assembled: Assembled | None = None
        self._offered = AdapterDirectory(options.adapters_dir, self._names)
        self._weights_dir = WeightsDirectory(options.weights_dir)
        self._operations: Operations | None = None
        self._watch: asyncio.Task[None] | None = None

    async def load(self) -> Sequence[ModelInfo]:
        """The model, and each adapter as a model of its own. Raises: ConfigurationError, see `model_loader.load`."""
        from zfabric.backends.hf_transformers.operations import Operations

        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._assembled = await asyncio.to_thread(self._assemble)
        self.slots = self._assembled.loaded.batch_size_max
        if isinstance(self._assembled.graphs, str):
            self.steps.log("step_graphs_refused", error=self._assembled.graphs)
        layout = self._assembled.layout
        if isinstance(layout, KVLayout) and layout.kept_because is not None:
            self.steps.log("kv_windows_kept", because=layout.kept_because)
        self._operations = Operations(
            self._assembled, self._names[0], self._announce, self._offered, self._weights_dir, self._other_weights
        )
        self._assembled.engine.weight_version = self.options.weight_version
        self._watch = self._loop.create_task(self._watch_engine(self._assembled.engine))
        if self.options.tell_cache:
            self._assembled.engine.tell_cache(self._names[0], self._cache_changed)
        return self._models()

    def _announce(self) -> None:
        self.steps.models_changed(self._models())

    def _other_weights(self, version: str) -> None:
        self.steps.log("weights_updated", weight_version=version)
        self._announce()

    def _cache_changed(self, changes: CacheTranslator) -> None:
        """On the engine's thread."""
        assert self._assembled is not None
        changes.tell([self._names[0], *self._assembled.adapters.names], self.steps)

    async def _watch_engine(self, engine: Engine) -> None:
        """Notice a turn of the engine that does not end."""
        limit_s = self.options.stall_ms / 1_000
        while True:
            await asyncio.sleep(min(_WATCH_INTERVAL_S, limit_s / 4))
            if engine.hangs(limit_s):
                message = f"the engine has made no step for {limit_s:g} s"
                self._died(EngineStalledError(message, limit_ms=self.options.stall_ms))
                return

    @property
    def _names(self) -> tuple[str, ...]:
        return self.options.model_names or (Path(self.options.model).name,)

    def _models(self) -> list[ModelInfo]:
        """What is served now."""
        assert self._assembled is not None
        loaded = self._assembled.loaded
        classifier = self._assembled.classifier
        divided = self._assembled.ranks is not None
        if divided or not loaded.embeds:
            # Other ranks are told of passes over pages alone; what hears makes no vectors of texts.
            capabilities = []
        elif classifier is None:
            capabilities = ["embed", "embed_tokens"] + ["score"] * loaded.compares
        else:
            capabilities = ["classify"] + ["score", "reward"] * classifier.compares
        capabilities += ["count_tokens", "tokenize", "detokenize"]
        if loaded.generates:
            capabilities += ["generate", "resume"] + ["chat"] * loaded.chats
            capabilities += ["multimodal"] * (loaded.kind in ("vision", "speech"))
        first, *aliases = self._names
        not_done = self._assembled.defaults.not_done
        model = ModelInfo(
            name=first,
            aliases=aliases,
            context_length=loaded.context_length,
            capabilities=capabilities,
            parameters=self._honoured(loaded),
            extra=sorted(self.extra.keys() - _OTHERS_EXTRA.get(loaded.kind, _OTHERS_EXTRA["causal"])),
            dimensions=loaded.pooler.dimensions if classifier is None else 0,
            slots=self.slots,
            defaults=dict(self._assembled.defaults.parameters),
            loadable=self._offered.names(),
            details={
                "engine": "transformers",
                "architecture": type(loaded.model).__name__,
                "device": loaded.device,
                "dtype": loaded.dtype,
                "kv_tokens_max": loaded.kv_tokens_max,
                **speculation_told(self.options),
                **loaded.quantized,
                **({"tensor_parallel": self.options.tensor_parallel} if divided else {}),
                **(cache_told(self._assembled, self.options) if loaded.generates else {}),
                **vectors_told(loaded),
                **hearing_told(loaded),
                **(self._assembled.answer_format.details if loaded.generates else {}),
                **({"weight_version": version} if (version := self._assembled.engine.weight_version) else {}),
                **({"generation_config_not_done": ", ".join(not_done)} if not_done else {}),
            },
        )
        return [model] + [
            structs.replace(
                model, name=adapter.name, aliases=[], loadable=[],
                details={**model.details, **adapter_details(adapter, first)},
            )
            for adapter in self._assembled.adapters
        ]  # fmt: skip

    def _honoured(self, loaded: Loaded) -> list[str]:
        """Parameters that this model can honour; a request with another is refused by name."""
        from zfabric.backends.hf_transformers.request import structured_outputs

        if not loaded.generates:
            return []
        assert self._assembled is not None
        guided = {*structured_outputs.GUIDED, "response_format", "tool_choice"}
        missing = set() if structured_outputs.guidable(loaded.tokenizer) else guided
        missing |= self._assembled.answer_format.missing
        if loaded.kind in ("paired", "speech"):
            # The encoder reads the prompt; nothing predicts it.
            missing.add("prompt_logprobs")
        if self._assembled.ranks is not None:
            # A search has a padded cache of its own.
            missing.add("use_beam_search")
        return sorted(self.parameters - missing)

    def _assemble(self) -> Assembled:
        """Everything slow, on a thread: imports, weights, and a first pass through the model."""
        from zfabric.backends.hf_transformers.setup.assembly import assemble

        return assemble(
            self.options,
            self._names,
            on_step=lambda step: self._post(self._hand_over, step),
            on_failure=lambda answer, error: self._post(self._give_up, answer, error),
            on_restart=lambda error: self._post(self._restarted, error),
            on_death=lambda error: self._post(self._died, error),
        )

    def begin(self, request: GenerateRequest) -> None:
        assert self._assembled is not None
        if not self._assembled.loaded.generates:
            raise UnsupportedOperationError(f"{self._names[0]!r} makes vectors and no text", operation="generate")
        self._assembled.engine.submit(request)

    def abort(self, request_id: str) -> None:
        if self._assembled is not None:
            self._assembled.engine.abort(request_id)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """One vector per input. Texts of requests that wait at the same time share passes.

        When cancelled, those of its texts that are not computed yet are not.
        """
        result: EmbedResult = await self._pooled(self._embedder("embed").pieces, request)
        return result

    async def embed_tokens(self, request: EmbedTokensRequest) -> EmbedTokensResult:
        """One vector per token of each input: hidden states, special tokens included. Batched as those of `embed`."""
        result: EmbedTokensResult = await self._pooled(self._embedder("embed_tokens").token_pieces, request)
        return result

    async def score(self, request: ScoreRequest) -> list[float]:
        """By a head with one label, else by the cosine of vectors. Batched as those of `embed`."""
        assert self._assembled is not None
        classifier = self._assembled.classifier
        if classifier is not None:
            return classifier.scores(await self._pooled(classifier.scored, request))
        texts = EmbedRequest(inputs=[request.query, *request.documents], model=request.model)
        return cosines(await self.embed(texts))

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        """The probability of each class. Texts of requests that wait at the same time share passes."""
        classifier = self._head("classify")
        return classifier.classes(await self._pooled(classifier.classified, request))

    async def reward(self, request: RewardRequest) -> list[list[float]]:
        """What the head says of each text or chat, as it computes it."""
        classifier = self._head("reward")
        rows: list[list[float]] = (await self._pooled(classifier.rewarded, request)).tolist()
        return rows

    def _embedder(self, operation: str) -> Embedder:
        assert self._assembled is not None
        if self._assembled.ranks is not None:
            raise UnsupportedOperationError(
                f"{self._names[0]!r} is divided over ranks and makes text alone", operation=operation
            )
        if self._assembled.classifier is not None:
            raise UnsupportedOperationError(
                f"{self._names[0]!r} judges texts and makes no vectors", operation=operation
            )
        return self._assembled.embedder

    def _head(self, operation: str) -> Classifier:
        assert self._assembled is not None
        if self._assembled.classifier is None:
            raise UnsupportedOperationError(
                f"{self._names[0]!r} has no head that judges texts, it cannot {operation}", operation=operation
            )
        return self._assembled.classifier

    async def _pooled(self, pieces_of: Callable[[T], Pieces], request: T) -> Any:
        """What the queue makes of a request."""
        assert self._assembled is not None
        pieces = await asyncio.to_thread(pieces_of, request)
        return await asyncio.wrap_future(self._assembled.queue.submit(pieces))

    async def count_tokens(self, request: CountRequest) -> int:
        return len(await self.tokenize(request))

    async def detokenize(self, request: DetokenizeRequest) -> str:
        assert self._assembled is not None
        tokenizer = self._assembled.loaded.tokenizer
        known_tokens(request.token_ids, len(tokenizer))
        skip = request.skip_special_tokens
        return str(await asyncio.to_thread(tokenizer.decode, request.token_ids, skip_special_tokens=skip))

    async def tokenize(self, request: CountRequest) -> list[int]:
        assert self._assembled is not None
        loaded, tokens = self._assembled.loaded, self._assembled.prompts

        def make() -> list[int]:
            from zfabric.backends.front.images import has_images, see

            if has_images(request.messages):
                seen = see(loaded.processor, loaded.tokenizer, request.messages or (), request.tools, request.chat)
                return list(seen[0])
            return tokens.make(request.prompt, request.messages, None, request.tools, request.chat, bounded=False)

        return await asyncio.to_thread(make)

    async def operate(self, request: OperateRequest) -> Any:
        """See `Operations.run`."""
        assert self._operations is not None
        return await self._operations.run(request)

    def load_report(self) -> EngineLoad:
        if self._assembled is None:
            return EngineLoad()
        engine = self._assembled.engine
        # Whoever plans memory of the same device is told here, since this is looked at every beat.
        self._assembled.loaded.room.took(engine.kv_tokens_held)
        # In tokens: what blocks are depends on the kind of cache.
        return EngineLoad(
            waiting=engine.waiting,
            progress=engine.steps_taken,
            kv_blocks_free=engine.kv_tokens_free,
            gauges=engine.gauges,
        )

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._operations is not None:
            self._operations.weights.close()
        if self._assembled is not None:
            await asyncio.to_thread(self._assembled.engine.stop)
            if self._assembled.ranks is not None:
                await asyncio.to_thread(self._assembled.ranks.close)
            if self._assembled.loaded.room.memory is not None:
                self._assembled.loaded.room.memory.release()

    def _post(self, call: Any, *arguments: Any) -> None:
        """From the engine's thread to the event loop, unless that is closed already."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _hand_over(self, step: list[tuple[Answer, Delta]]) -> None:
        names: list[str] = []
        token_ids: list[int] = []
        texts: list[str] = []
        others: list[tuple[str, Delta]] = []
        # Columns go first, so what follows another delta of its answer in a step is none of them.
        late: set[int] = set()
        for answer, delta in step:
            if answer.cancelled:
                # Its name may be in use again: what an aborted request still had is not the new one's.
                continue
            if answer.plain and delta.finish_reason is None and delta.extra is None and id(answer) not in late:
                names.append(answer.request.request_id)
                token_ids.append(delta.token_ids[0])
                texts.append(delta.text)
            else:
                others.append((answer.request.request_id, delta))
                late.add(id(answer))
        self.steps.emit_columns(names, token_ids, texts, others)

    def _give_up(self, answer: Answer, error: FabricError) -> None:
        if not answer.cancelled:
            self.steps.fail(answer.request.request_id, error)

    def _restarted(self, error: FabricError) -> None:
        assert self._assembled is not None
        self.steps.log("engine_restarted", error=str(error), restarts=self._assembled.engine.restarts)

    def _died(self, error: FabricError) -> None:
        self.steps.engine_died(error)
