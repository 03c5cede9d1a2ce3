"""All that knows the inside of vLLM, or that differs between its versions. A new release is a matter of this file.

Written for vLLM 0.31 and 0.32. The rest of the package uses what vLLM documents for callers of its asynchronous engine.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from zfabric.errors import (
    BackendError,
    FabricError,
    ParameterRangeError,
    QueueFullError,
    RequestError,
    WorkerLostError,
)

#: Set unless the operator has set them, before vLLM is imported, which reads them then.
_ENVIRONMENT: Final = {
    # Standard output belongs to the worker's line that says it is ready.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # An address that the operator allows must not lead to another that he does not.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # A worker reports to its controller and to nobody else.
    "VLLM_NO_USAGE_STATS": "1",
    # A process with an event loop, sockets and threads must not be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def prepare_environment() -> None:
    """Call before vLLM is imported for the first time."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def version() -> str:
    """vLLM's own version; builds for other devices have distributions of other names."""
    import vllm

    return str(vllm.__version__)


def argument_parser(**options: Any) -> Any:
    """vLLM's parser, which reads nested configurations such as ``--compilation-config.level 3``."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return FlexibleArgumentParser(**options)


def sampling_fields() -> frozenset[str]:
    """Fields of the installed version's sampling parameters."""
    from vllm import SamplingParams

    return frozenset(SamplingParams.__struct_fields__)


def dangerous_fields(engine: Any) -> frozenset[str]:
    """Sampling parameters that this engine would die of."""
    configuration = engine.vllm_config
    if configuration.lora_config is not None and configuration.device_config.device_type == "cpu":
        # Of two such requests in one step: the kernel takes rows of the prompt for requests.
        return frozenset({"prompt_logprobs"})
    return frozenset()


def structured_outputs(kind: str, value: Any) -> dict[str, Any]:
    """The sampling argument that constrains the text: kind is json, regex, choice, grammar or json_object."""
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**{kind: value})}


def watch_outputs(engine: Any) -> None:
    """Let the engine's reader run from now on, not only from the first request on: it is what notices a death."""
    engine._run_output_handler()


async def shut_down(engine: Any) -> None:
    """End the engine and its processes, which takes seconds."""
    if engine.output_handler is not None:
        # It would report the end as a failure.
        engine.output_handler.cancel()
    await asyncio.to_thread(engine.shutdown)
    # vLLM closes the sockets, and leaves their context to whoever collects garbage.
    await asyncio.to_thread(engine.engine_core.resources.ctx.destroy, 0)


async def warm_up(engine: Any) -> None:
    """Let the engine compile what it compiles at the first request for log-probabilities.

    That takes seconds, and all running streams would wait for it.
    """
    from vllm import SamplingParams

    # An engine may be told to give none.
    wanted = 1 if engine.vllm_config.model_config.max_logprobs else None
    async for _ in engine.generate(tokens_input([0]), SamplingParams(max_tokens=1, logprobs=wanted), "warm-up"):
        pass


class StepTap:
    """Hands out each engine step's outputs as one list, instead of one queue and one waiting task per request.

    vLLM's output processor returns the outputs of requests that have no queue as a list, which is how its synchronous
    engine works. So generations are registered without a queue, and what it returns is collected until the step's
    last part has been processed.

    Args:
        engine: An `AsyncLLM`.
        on_step: Called on the event loop with all `RequestOutput`s of a step.
        on_death: Called on the event loop when the engine will give out nothing any more.
    """

    def __init__(
        self, engine: Any, on_step: Callable[[list[Any]], None], on_death: Callable[[BaseException], None]
    ) -> None:
        processor = engine.output_processor
        self._process, self._add = processor.process_outputs, processor.add_request
        self._end_of_step, self._propagate = processor.update_scheduler_stats, processor.propagate_error
        self._processor = processor
        self._on_step = on_step
        self._on_death = on_death
        self._step: list[Any] = []
        # Traces of requests are made of the same figures.
        self._counts = _others_count() or bool(processor.tracing_enabled)
        self._continued: dict[str, tuple[list[int], int]] = {}
        processor.process_outputs, processor.add_request = self._process_outputs, self._add_request
        processor.update_scheduler_stats, processor.propagate_error = self._update_scheduler_stats, self._fail

    def continue_after(self, request_id: str, token_ids: list[int], characters: int) -> None:
        """The prompt of this request, about to be added, ends with tokens of its answer: they are not prompt to its text.

        Args:
            characters: How much of their text has been given out.
        """
        self._continued[request_id] = token_ids, characters

    def forget(self, request_id: str) -> None:
        """The request was not added after all, or has been."""
        self._continued.pop(request_id, None)

    def _process_outputs(self, outputs: Any, timestamp: Any, iteration: Any, *more: Any, **options: Any) -> Any:
        # Counting tokens and times of every request is a tenth of the work, and the worker's beats do not carry them.
        processed = self._process(outputs, timestamp, iteration if self._counts else None, *more, **options)
        self._step += processed.request_outputs
        processed.request_outputs = []
        return processed

    def _update_scheduler_stats(self, *arguments: Any) -> None:
        """Called once per engine step, after all of its outputs."""
        self._end_of_step(*arguments)
        if self._step:
            step, self._step = self._step, []
            self._on_step(step)

    def _fail(self, error: Exception) -> None:
        for state in self._processor.request_states.values():
            if state.queue is not None:
                state.queue.put(error)
        self._on_death(error)

    def _add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        if request.sampling_params is None:
            self._add(request, prompt, parent_req, request_index, queue)
            return
        token_ids, characters = self._continued.get(request.external_req_id, ([], 0))
        if token_ids:
            request = copy.copy(request)
            request.prompt_token_ids = request.prompt_token_ids[: -len(token_ids)]
        self._add(request, prompt, parent_req, request_index, None)
        if token_ids:
            state = self._processor.request_states[request.request_id]
            state.detokenizer.update(list(token_ids), False)
            state.detokenizer._last_output_text_offset = characters
            state.sent_tokens_offset = len(token_ids)


def _others_count() -> bool:
    """Whether plug-ins of vLLM's want its statistics of iterations."""
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    return bool(load_stat_logger_plugin_factories())


def translated(error: BaseException) -> FabricError:
    """What a caller is told of an error of vLLM's."""
    from vllm import exceptions
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, FabricError):
        return error
    if isinstance(error, EngineDeadError):
        return WorkerLostError(f"engine died: {error}")
    if isinstance(error, exceptions.GracefulHTTPError):
        return QueueFullError(str(error))
    if isinstance(error, (exceptions.VLLMClientError, ValueError, TypeError, NotImplementedError)):
        parameter = getattr(error, "parameter", None)
        if parameter:
            return ParameterRangeError(str(error), parameter=str(parameter), value=str(getattr(error, "value", "")))
        return RequestError(str(error))
    return BackendError(f"{type(error).__name__}: {error}")


def statistics_logger(record: Callable[[int, Any], None]) -> Callable[[Any, int], Any]:
    """A factory of vLLM's loggers of statistics that calls `record(engine, scheduler_stats)` at every step."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._engine = engine_index

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            record(self._engine, scheduler_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return Recorder


def record_alone(engine: Any, record: Callable[[int, Any], None]) -> None:
    """Have nothing but `record` called at every step, before the engine's reader starts.

    Beside the loggers that it is given vLLM keeps dozens of metrics for Prometheus, an eighth of the worker's time, which
    nobody can ask this process for. Where plug-ins of vLLM's want statistics, all stays as it is.
    """
    if not _others_count():
        engine.logger_manager = _Recorder(record)


class _Recorder:
    """Stands in for vLLM's manager of loggers."""

    def __init__(self, record: Callable[[int, Any], None]) -> None:
        self._record = record

    def record(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: int = 0, **_: Any) -> None:
        self._record(engine_idx, scheduler_stats)

    def log(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, *_: Any) -> None:
        """The worker knows."""

    def record_admission_rejection(self, *_: Any) -> None:
        """The request's caller is told."""


def pooling_params(task: str, *, activate: bool, segments: int | None = None) -> Any:
    """Parameters of one pooling request.

    Args:
        task: embed or classify.
        activate: Give vectors of length 1, or probabilities, instead of what the model computes.
        segments: Where the second text of a pair begins, for models that tell the two apart.
    """
    from vllm import PoolingParams

    extra = None if segments is None else {"compressed_token_type_ids": segments}
    return PoolingParams(task=task, use_activation=activate, extra_kwargs=extra)


def render_pair(engine: Any, query: str, document: str) -> tuple[list[int], int | None]:
    """Token ids of two texts that a cross-encoder compares, and where the second begins if the model wants to know."""
    tokenizer = engine.renderer.get_tokenizer()
    if not engine.vllm_config.model_config.use_sep_token:
        return list(tokenizer(query + document)["input_ids"]), None
    encoded = tokenizer(text=query, text_pair=document)
    segments = encoded.get("token_type_ids") or []
    return list(encoded["input_ids"]), segments.index(1) if 1 in segments else None


def tokens_input(token_ids: list[int]) -> Any:
    """An engine's input that needs no more preparation."""
    from vllm.inputs import tokens_input as make

    return make(token_ids)


async def render_text(engine: Any, text: str, *, inline: bool) -> list[int]:
    """Token ids of a text, special tokens included.

    Args:
        inline: Do it here and now, which for short texts takes less than a change of threads.
    """
    parameters = _unbounded(engine.renderer.default_cmpl_tok_params)
    prompts = [{"prompt": text}]
    if inline:
        (rendered,) = engine.renderer.render_cmpl(prompts, parameters)
    else:
        (rendered,) = await engine.renderer.render_cmpl_async(prompts, parameters)
    return list(rendered["prompt_token_ids"])


async def render_chat(
    engine: Any, messages: list[dict[str, Any]], template: str | None, arguments: Mapping[str, Any]
) -> Any:
    """An engine's input of chat messages, images and all."""
    from vllm.renderers import ChatParams

    chat = ChatParams(chat_template=template, chat_template_kwargs=dict(arguments))
    parameters = _unbounded(engine.renderer.default_chat_tok_params)
    _, (rendered,) = await engine.renderer.render_chat_async([messages], chat, parameters)
    return rendered


def chat_template(engine: Any, template: str | None) -> str | None:
    """The template that messages go through, None if there is none."""
    from vllm.renderers.hf import resolve_chat_template

    try:
        found = resolve_chat_template(
            engine.renderer.get_tokenizer(), template, None, model_config=engine.vllm_config.model_config
        )
    except Exception:  # noqa: BLE001 — tokenizers that are not of transformers bring templates of their own, or none
        return template
    return str(found) if found else None


def _unbounded(parameters: Any) -> Any:
    """Lengths are checked, and prompts cut, by the worker: its errors name both lengths."""
    return dataclasses.replace(parameters, max_total_tokens=None)


def end_tokens(engine: Any) -> frozenset[int]:
    """Tokens that end an answer, by the generation settings and the tokenizer."""
    found: set[int] = set()
    settings = engine.vllm_config.model_config.try_get_generation_config()
    for value in (settings.get("eos_token_id"), getattr(engine.renderer.get_tokenizer(), "eos_token_id", None)):
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, Iterable):
            found.update(value)
    return frozenset(found)
