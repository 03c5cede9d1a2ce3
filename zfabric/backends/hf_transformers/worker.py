"""ModelWorker: a PyTorch model of transformers on the fabric, batched continuously."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.errors import BackendError, FabricError, OutOfMemoryError
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, EmbedRequest, EmbedResult, GenerateRequest, SamplingParams
from zfabric.worker.base import BaseModelWorker, EngineLoad

if TYPE_CHECKING:
    from zfabric.backends.hf_transformers.embedding import Embedder
    from zfabric.backends.hf_transformers.engine import Engine
    from zfabric.backends.hf_transformers.loading import Loaded

#: The engine's thread holds the interpreter between two tensor operations; beats and cancels must get it quickly.
_SWITCH_INTERVAL_S: Final = 0.0005


class ModelWorker(BaseModelWorker):
    """Serves one model: text from causal language models, vectors from encoders and from those as well."""

    parameters = frozenset(
        {
            "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "n",
            "logprobs", "prompt_logprobs", "echo", "logit_bias", "bad_words", "truncate_prompt", "skip_special_tokens",
        }
    )  # fmt: skip
    Options = TransformersOptions

    def __init__(self, options: TransformersOptions) -> None:
        self.options = options
        self.slots = options.max_batch_size
        self._engine: Engine | None = None
        self._loaded: Loaded | None = None
        self._embedder: Embedder | None = None

    async def load(self) -> ModelInfo:
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        loaded = await asyncio.to_thread(self._load)
        names = self.options.model_names or (Path(self.options.model).name,)
        capabilities = ["embed", "count_tokens"]
        if loaded.generates:
            capabilities += ["generate", "resume"] + ["chat"] * (loaded.tokenizer.chat_template is not None)
        return ModelInfo(
            name=names[0],
            aliases=list(names[1:]),
            context_length=loaded.context_length,
            capabilities=capabilities,
            parameters=sorted(self.parameters) if loaded.generates else [],
            dimensions=loaded.dimensions,
            slots=self.slots,
            details={
                "engine": "transformers",
                "architecture": type(loaded.model).__name__,
                "device": loaded.device,
                "dtype": loaded.dtype,
                "kv_tokens_max": loaded.kv_tokens_max,
                "pooling": loaded.pooling,
            },
        )

    def _load(self) -> Loaded:
        """Everything slow, on a thread: imports, weights, and a first pass through the model."""
        from zfabric.backends.hf_transformers.embedding import Embedder
        from zfabric.backends.hf_transformers.engine import Engine
        from zfabric.backends.hf_transformers.loading import load

        loaded = self._loaded = load(self.options)
        engine = self._engine = Engine(
            loaded.model,
            loaded.tokenizer,
            context_length=loaded.context_length,
            batch_size_max=self.options.max_batch_size,
            prefill_chunk_tokens=self.options.prefill_chunk_tokens,
            kv_tokens_max=loaded.kv_tokens_max,
            seed=self.options.seed,
            on_step=lambda step: self._post(self._hand_over, step),
            on_failure=lambda request_id, error: self._post(self._give_up, request_id, error),
            on_death=lambda error: self._post(lambda: self.steps.engine_died(error)),
        )
        self._embedder = Embedder(
            loaded.model if not loaded.generates else loaded.model.base_model,
            loaded.tokenizer,
            context_length=loaded.context_length,
            pooling=loaded.pooling,
            dimensions=loaded.dimensions,
        )
        engine.start()
        self._warm_up(engine)
        return loaded

    def _warm_up(self, engine: Engine) -> None:
        """One short text through the model: lazy initialisation happens before the worker says that it is ready."""
        embedder = self._embedder
        assert embedder is not None
        engine.run_job(lambda: embedder.embed(EmbedRequest(inputs=["warm-up"]))).result()
        if self._loaded is not None and self._loaded.generates:
            engine.submit(
                GenerateRequest(
                    prompt="warm-up", request_id="", sampling=SamplingParams(max_new_tokens=2, temperature=0)
                )
            )

    def begin(self, request: GenerateRequest) -> None:
        assert self._engine is not None
        self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        assert self._engine is not None
        self._engine.abort(request_id)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        embedder = self._embedder
        assert embedder is not None
        result: EmbedResult = await self._job(lambda: embedder.embed(request))
        return result

    async def count_tokens(self, request: CountRequest) -> int:
        loaded = self._loaded
        assert loaded is not None

        def count() -> int:
            from zfabric.backends.hf_transformers.prompts import prompt_tokens

            return len(prompt_tokens(loaded.tokenizer, request.prompt, request.messages, None))

        return int(await asyncio.to_thread(count))

    async def _job(self, job: Any) -> Any:
        """Run on the engine's thread. What torch raises becomes an error of ours."""
        assert self._engine is not None
        try:
            return await asyncio.wrap_future(self._engine.run_job(job))
        except FabricError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if "out of memory" in str(error).lower():
                raise OutOfMemoryError(f"out of device memory: {error}") from error
            raise BackendError(f"{type(error).__name__}: {error}") from error

    def load_report(self) -> EngineLoad:
        engine = self._engine
        if engine is None:
            return EngineLoad()
        return EngineLoad(
            waiting=engine.waiting, progress=engine.steps_taken, gauges={"kv_tokens_free": engine.kv_tokens_free}
        )

    async def close(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)

    def _post(self, call: Any, *arguments: Any) -> None:
        """From the engine's thread to the event loop, unless that is closed already."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _hand_over(self, step: list[tuple[str, Delta]]) -> None:
        self.steps.emit(step)

    def _give_up(self, request_id: str, error: FabricError) -> None:
        self.steps.fail(request_id, error)
