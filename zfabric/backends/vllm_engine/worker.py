"""VLLMWorker: vLLM's asynchronous engine on the fabric."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from zfabric.backends.front.adapters import adapter_details
from zfabric.backends.front.continuation import continues
from zfabric.backends.front.embed_inputs import told_prompts
from zfabric.backends.front.parsing import force_calls
from zfabric.backends.vllm_engine import sampling
from zfabric.backends.vllm_engine.answers import Answer
from zfabric.backends.vllm_engine.arguments import HELP, parse, print_help
from zfabric.backends.vllm_engine.compat.addition import Addition
from zfabric.backends.vllm_engine.compat.environment import version
from zfabric.backends.vllm_engine.compat.failures import translated
from zfabric.backends.vllm_engine.compat.reasoning import reasoning_options
from zfabric.backends.vllm_engine.compat.rendering import salted, tokens_input
from zfabric.backends.vllm_engine.operations import Operations
from zfabric.backends.vllm_engine.prompts import Prompt
from zfabric.backends.vllm_engine.runtime import Runtime
from zfabric.errors import BackendError, Detail, FabricError, WorkerDrainingError
from zfabric.wire.chat import OPTIONS
from zfabric.wire.extra import COMMON
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, FinishReason, GenerateRequest, OperateRequest, Usage
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
from zfabric.worker.traces import trace_headers

T = TypeVar("T")

#: How often a request is given to the engine anew when that lacks an image of it. Once is enough, unless one more request
#: with the same image is cancelled at that very moment.
_IMAGE_TRIES: Final = 3


class VLLMWorker(StepwiseModelWorker):
    """Serves one model, and LoRA adapters of it, with vLLM. All outputs of an engine step leave as one.

    Args:
        argv: vLLM's engine arguments, and the few of `arguments.Arguments`.
        settings: The same from a file.
    """

    parameters = sampling.PARAMETERS
    extra = COMMON

    def __init__(self, argv: Sequence[str], settings: Mapping[str, Any] | None = None) -> None:
        self._argv = list(argv)
        self._settings = dict(settings or {})
        self._runtime: Runtime | None = None
        self._answers: dict[str, Answer] = {}
        self._admissions: dict[str, asyncio.Task[None]] = {}
        self._aborted: list[str] = []
        self._chores: set[asyncio.Task[None]] = set()
        self._closing = False

    @classmethod
    def from_arguments(cls, argv: Sequence[str], settings: Mapping[str, Any]) -> VLLMWorker:
        """Made by the command line. Parsing waits for `load`, since vLLM takes seconds to import.

        Raises:
            SystemExit: Help was asked for, and given.
        """
        if HELP in argv:
            print_help()
            raise SystemExit(0)
        return cls(argv, settings)

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def load(self) -> list[ModelInfo]:
        self._loop = asyncio.get_running_loop()
        runtime = await asyncio.to_thread(self._start)
        self._runtime = runtime
        await self._connect(runtime)
        self._operations = Operations(runtime, lambda: self.steps.models_changed(self._models()))
        self.slots = runtime.slots
        if runtime.cache_events is not None:
            runtime.cache_events.start(runtime.names, lambda: self.steps)
        return self._models()

    async def _connect(self, runtime: Runtime) -> None:
        """Have the engine's outputs come here."""
        self._outputs = await runtime.open(self._on_step, self._on_failure, self._on_death)
        if self._outputs.lacking:
            self.steps.log("step_tap_off", reason=self._outputs.lacking)

    def _start(self) -> Runtime:
        """Everything slow, on a thread: imports, parsing, processes, weights."""
        return Runtime.start(parse(self._argv, self._settings))

    def _models(self) -> list[ModelInfo]:
        """The model, and each adapter as a model."""
        runtime = self._served()
        configuration = runtime.engine.vllm_config.model_config
        capabilities = ["count_tokens", "tokenize", "detokenize"]
        if runtime.generates:
            capabilities += ["generate", "resume"] + ["chat"] * runtime.prompts.chat
            capabilities += ["multimodal"] * bool(configuration.is_multimodal_model)
        capabilities += runtime.pooling.capabilities
        sentences = runtime.prompts.sentences
        details: dict[str, Detail] = {
            "engine": "vllm",
            "version": version(),
            "architecture": str(configuration.architecture),
            "dtype": str(configuration.dtype).removeprefix("torch."),
            "tasks": ",".join(runtime.tasks),
            "kv_blocks": runtime.statistics.kv_blocks,
            **(runtime.format.details if runtime.generates else {}),
            **({"step_tap_off": self._outputs.lacking} if self._outputs.lacking else {}),
            **told_prompts(sentences.prompts, sentences.prompt_name),
        }

        def info(name: str, aliases: Sequence[str], **more: Detail) -> ModelInfo:
            return ModelInfo(
                name=name,
                aliases=list(aliases),
                context_length=runtime.context_length,
                capabilities=capabilities,
                parameters=sorted(self._honoured(runtime)) if runtime.generates else [],
                defaults=dict(runtime.defaults.parameters),
                extra=sampling.extra_keys(runtime.engine) if runtime.generates else [],
                dimensions=int(configuration.get_hidden_size()) if runtime.pooling.embeds else 0,
                details={**details, **more},
            )

        name, *aliases = runtime.arguments.names
        adapters = [info(adapter.name, (), **adapter_details(adapter, name)) for adapter in runtime.adapters]
        base = info(name, aliases)
        base.loadable = runtime.offered.names()
        return [base, *adapters]

    def _honoured(self, runtime: Runtime) -> set[str]:
        """Parameters of a model that makes text."""
        known = sampling.supported(runtime.engine)
        missing = runtime.format.missing | (set() if "guided_json" in known else {"tool_choice"})
        return {*known, *OPTIONS} - missing

    def load_report(self) -> EngineLoad:
        runtime = self._runtime
        if runtime is None:
            return EngineLoad()
        return runtime.statistics.load(0 if runtime.asleep else None)

    async def close(self) -> None:
        self._closing = True
        for task in self._admissions.values():
            task.cancel()
        if self._runtime is not None:
            await self._runtime.close()

    # ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, request: GenerateRequest) -> None:
        if self._served().asleep:
            raise WorkerDrainingError("the engine sleeps")
        self._start_admission(request, _IMAGE_TRIES, trace_headers())

    def _start_admission(self, request: GenerateRequest, tries: int, headers: dict[str, str]) -> None:
        self._admissions[request.request_id] = self._loop.create_task(self._admit(request, tries, headers))

    def abort(self, request_id: str) -> None:
        task = self._admissions.pop(request_id, None)
        if task is not None:
            task.cancel()
        elif request_id not in self._answers:
            return
        self._forget(request_id)
        if not self._aborted:
            # All that end in this turn of the loop, as when their client died, leave as one message.
            self._loop.call_soon(self._abort_all)
        self._aborted.append(request_id)

    def _forget(self, request_id: str) -> None:
        """A request has ended here."""
        self._answers.pop(request_id, None)
        self._served().lora.release(request_id)

    def _abort_all(self) -> None:
        doomed, self._aborted = self._aborted, []
        task = self._loop.create_task(self._served().engine.abort(doomed))
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _admit(self, request: GenerateRequest, tries: int, headers: dict[str, str]) -> None:
        """Hand a request to the engine. Args: tries, headers: See `Answer`."""
        request_id = request.request_id
        try:
            await self._add(request, tries, headers)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 — whatever vLLM raises for a request is that request's error
            self._answers.pop(request_id, None)
            self.steps.fail(request_id, translated(error))
        finally:
            if self._admissions.get(request_id) is asyncio.current_task():
                del self._admissions[request_id]
                if request_id not in self._answers:
                    self._forget(request_id)

    async def _add(self, request: GenerateRequest, tries: int, headers: dict[str, str]) -> None:
        runtime, request_id = self._served(), request.request_id
        # Now: it may be unloaded while the prompt is prepared.
        adapter = await runtime.lora.hold(request_id, runtime.adapters.find(request.model))
        prompt = await runtime.prompts.of(request)
        request.sampling = runtime.defaults.lengths(request.sampling, len(prompt.token_ids))
        force_calls(request)
        echo = self._echo(request, prompt)
        readers = runtime.reading.readers(request, prompt.token_ids, echo)
        drawn = request.resume_token_ids
        reason = self._ended(request, len(prompt.token_ids))
        if reason is not None and not request.sampling.reproducible:
            delta = Delta(finish_reason=reason)
            if readers:
                delta = runtime.reading.ending(request, readers[0], reason, self._ends(request))
            delta.usage = Usage(len(prompt.token_ids), len(drawn))
            self.steps.emit([(request_id, delta)])
            return
        continued = self._outputs.goes_on and prompt.plain and continues(request)
        redraw = bool(drawn) and (reason is not None or not continued)
        parameters = sampling.translate(request, drawn=0 if redraw else len(drawn))
        given, known = prompt.input, None
        if drawn and not redraw:
            given = tokens_input([*prompt.token_ids, *drawn])
            # A reader has to see all of the text, and leaves out what has been seen.
            known = drawn, 0 if readers else max(0, request.resume_characters - len(echo))
        tries = 0 if prompt.plain else tries
        self._answers[request_id] = Answer(
            request, len(prompt.token_ids), echo=echo, redraw=redraw, tries=tries, headers=headers, readers=readers
        )
        ended = not readers or readers[0].answers
        constrained = {} if parameters.structured_outputs is None else reasoning_options(runtime.engine, ended=ended)
        asked = Addition(
            request_id,
            salted(given, request.extra.get("cache_salt")),
            parameters,
            adapter=adapter,
            priority=request.priority if runtime.priorities else 0,
            headers=headers,
            constrained=constrained,
            continued=known,
            marks=runtime.reading.marks(request, readers),
        )
        await self._outputs.add(asked)

    def _echo(self, request: GenerateRequest, prompt: Prompt) -> str:
        if not request.sampling.echo:
            return ""
        if request.prompt is not None and prompt.whole:
            return request.prompt
        skip = request.sampling.skip_special_tokens
        return self._served().prompts.text(prompt.token_ids, skip_special_tokens=skip)

    def _ended(self, request: GenerateRequest, prompt_tokens: int) -> FinishReason | None:
        """Why the answer ends with what its reader has already: only its end got lost."""
        drawn, wanted = request.resume_token_ids, request.sampling
        if not drawn:
            return None
        if drawn[-1] in self._ends(request) and len(drawn) > wanted.min_new_tokens:
            return "stop"
        if wanted.stop and len(drawn) > wanted.min_new_tokens:
            text = self._served().prompts.text(drawn, skip_special_tokens=wanted.skip_special_tokens)
            if any(stop in text for stop in wanted.stop):
                return "stop"
        room = self._served().context_length - prompt_tokens
        if len(drawn) >= min(wanted.max_new_tokens or room, room):
            return "length"
        return None

    def _ends(self, request: GenerateRequest) -> frozenset[int]:
        """Tokens that end this answer."""
        wanted = request.sampling
        return frozenset(wanted.stop_token_ids) | (frozenset() if wanted.ignore_eos else self._served().end_tokens)

    def _on_step(self, outputs: list[Any]) -> None:
        """All that one engine step brought."""
        answers = self._answers
        names: list[str] = []
        token_ids: list[int] = []
        texts: list[str] = []
        others: list[tuple[str, Delta]] = []
        failed: list[tuple[str, FabricError]] = []
        for output in outputs:
            request_id = output.request_id
            answer = answers.get(request_id)
            if answer is None:
                continue
            if answer.tries and answer.lacks_image(output):
                if output.finished:
                    self._forget(request_id)
                    self._start_admission(answer.request, answer.tries - 1, answer.headers)
                continue
            try:
                plain = answer.plain_token(output)
                if plain is None:
                    others += [(request_id, delta) for delta in answer.deltas(output)]
                else:
                    names.append(request_id)
                    token_ids.append(plain[0])
                    texts.append(plain[1])
            except Exception as error:  # noqa: BLE001 — one answer must not take the engine's reader along
                failed.append((request_id, translated(error)))
            if output.finished:
                self._forget(request_id)
        if names or others:
            self.steps.emit_columns(names, token_ids, texts, others)
        for request_id, failure in failed:
            self.abort(request_id)
            self.steps.fail(request_id, failure)

    def _on_failure(self, request_id: str, error: BaseException) -> None:
        if request_id in self._answers:
            self._forget(request_id)
            self.steps.fail(request_id, translated(error))

    def _on_death(self, error: BaseException) -> None:
        if not self._closing:
            self._answers.clear()
            self.steps.engine_died(BackendError(f"vllm's engine has died: {error}"))

    # ── everything else ─────────────────────────────────────────────────────────────────────────────────────────────

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """One vector per input. When cancelled, the engine drops what is left."""
        return await self._pooled(request, lambda adapter: self._served().pooling.embed(request, adapter))

    async def count_tokens(self, request: CountRequest) -> int:
        return len(await self.tokenize(request))

    async def tokenize(self, request: CountRequest) -> list[int]:
        return await self._served().prompts.of_count(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        skip = request.skip_special_tokens
        prompts = self._served().prompts
        return prompts.text(prompts.checked(request.token_ids), skip_special_tokens=skip)

    async def score(self, request: ScoreRequest) -> list[float]:
        pooling, name = self._served().pooling, request.request_id
        return await self._pooled(
            request, lambda adapter: pooling.score(request.query, request.documents, name, adapter)
        )

    async def embed_tokens(self, request: EmbedTokensRequest) -> EmbedTokensResult:
        """One vector per token of each input. When cancelled, the engine drops what is left."""
        return await self._pooled(request, lambda adapter: self._served().pooling.embed_tokens(request, adapter))

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        return await self._pooled(request, lambda adapter: self._served().pooling.classify(request, adapter))

    async def reward(self, request: RewardRequest) -> list[list[float]]:
        return await self._pooled(request, lambda adapter: self._served().pooling.reward(request, adapter))

    async def _pooled(
        self,
        request: EmbedRequest | EmbedTokensRequest | ScoreRequest | ClassifyRequest | RewardRequest,
        work: Callable[[Any], Awaitable[T]],
    ) -> T:
        runtime = self._served()
        try:
            async with runtime.lora.using(request.request_id, runtime.adapters.find(request.model)) as adapter:
                return await work(adapter)
        except Exception as error:  # noqa: BLE001 — as above
            raise translated(error) from None

    async def operate(self, request: OperateRequest) -> Any:
        """See `Operations`."""
        try:
            return await self._operations.run(request)
        except Exception as error:  # noqa: BLE001 — as above
            raise translated(error) from None

    def _served(self) -> Runtime:
        assert self._runtime is not None, "not loaded"
        return self._runtime
