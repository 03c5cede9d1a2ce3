"""What the tap touches of vLLM's internals, compared with the installed version before anything depends on it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, Final

from zfabric.backends.vllm_engine.compat.addition import Addition
from zfabric.backends.vllm_engine.compat.one_by_one import OneByOne
from zfabric.backends.vllm_engine.compat.rendering import tokens_input
from zfabric.backends.vllm_engine.compat.step_tap import StepTap

#: Methods of the output processor, and how their parameters begin.
_METHODS: Final[dict[str, tuple[str, ...]]] = {
    "process_outputs": ("engine_core_outputs", "engine_core_timestamp", "iteration_stats"),
    "add_request": ("request", "prompt", "parent_req", "request_index", "queue"),
    "update_scheduler_stats": ("scheduler_stats",),
    "propagate_error": ("e",),
}
#: Its other attributes, and fields of what it is given and gives.
_ATTRIBUTES: Final = ("request_states", "tracing_enabled", "__dict__")
_REQUEST: Final = ("request_id", "external_req_id", "prompt_token_ids", "sampling_params")
_OUTPUT: Final = ("request_outputs",)
#: What a request in the engine has, and the state of its text.
_STATE: Final = ("queue", "detokenizer", "sent_tokens_offset")
_TEXT: Final = ("update", "decode_next", "_last_output_text_offset")
_NAME: Final = "self-test"
#: A prompt, and a token of its answer, that every vocabulary has.
_PROMPT: Final = [0, 0]


class TapError(Exception):
    """Something is not as the tap needs it."""


async def open_outputs(
    engine: Any,
    on_step: Callable[[list[Any]], None],
    on_failure: Callable[[str, BaseException], None],
    on_death: Callable[[BaseException], None],
    *,
    generates: bool,
) -> StepTap | OneByOne:
    """The engine's outputs: by the tap if that fits the installed version, else by vLLM's public API.

    Args:
        on_step: Called on the event loop with all `RequestOutput`s of a step.
        on_failure: Called on the event loop for a request that the engine refuses after it was handed over.
        on_death: Called on the event loop when the engine will give out nothing any more.
        generates: Whether the engine makes text.
    """
    try:
        check(engine)
        heard: list[Any] = []
        broken: list[BaseException] = []
        tap = StepTap(engine, heard.extend, broken.append)
        if generates:
            try:
                await _try(engine, tap, heard, broken)
            except BaseException:
                # While it is there, nothing of that answer is on its way any more: vLLM's reader would break at it.
                await engine.abort(_NAME)
                tap.remove()
                raise
    except TapError as error:
        return OneByOne(engine, on_step, on_failure, on_death, str(error))
    tap.on_step, tap.on_death = on_step, on_death
    return tap


def check(engine: Any) -> None:
    """Compare names and signatures. Raises: TapError, with what is missing."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessorOutput

    processor = getattr(engine, "output_processor", None)
    if processor is None:
        raise TapError("AsyncLLM has no output_processor")
    for name, wanted in _METHODS.items():
        method = getattr(processor, name, None)
        if not callable(method):
            raise TapError(f"OutputProcessor has no method {name}")
        there = tuple(inspect.signature(method).parameters)
        if there[: len(wanted)] != wanted:
            raise TapError(f"parameters of OutputProcessor.{name} are {', '.join(there)}, not {', '.join(wanted)}")
    _has(processor, "OutputProcessor", _ATTRIBUTES)
    fields = (*getattr(EngineCoreRequest, "__struct_fields__", ()), *getattr(EngineCoreRequest, "__annotations__", ()))
    for kind, there, names in (
        ("EngineCoreRequest", fields, _REQUEST),
        ("OutputProcessorOutput", tuple(OutputProcessorOutput.__annotations__), _OUTPUT),
    ):
        for name in names:
            if name not in there:
                raise TapError(f"{kind} has no {name}")


def _has(thing: Any, kind: str, names: tuple[str, ...]) -> None:
    for name in names:
        if not hasattr(thing, name):
            raise TapError(f"{kind} has no {name}")


async def _try(engine: Any, tap: StepTap, heard: list[Any], broken: list[BaseException]) -> None:
    """Have one answer go on through the tap. Raises: TapError: It did not come, or not as it has to."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    wanted = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0, output_kind=RequestOutputKind.DELTA)
    states = engine.output_processor.request_states
    try:
        await tap.add(Addition(_NAME, tokens_input(list(_PROMPT)), wanted, continued=(_PROMPT[1:], 0)))
    except Exception as error:
        raise TapError(f"a request cannot be added: {type(error).__name__}: {error}") from error
    known = [state for state in states.values() if getattr(state, "external_req_id", None) == _NAME]
    for state in known:
        _has(state, "RequestState", _STATE)
        _has(state.detokenizer, "the detokenizer", _TEXT)
    while not broken and not any(output.finished for output in heard):
        if not any(state in known for state in states.values()):
            await asyncio.sleep(0)
            break
        await asyncio.sleep(0.001)
    if broken:
        raise TapError(f"the engine broke: {type(broken[0]).__name__}: {broken[0]}")
    outputs = [output for output in heard if output.request_id == _NAME]
    drawn = [token for output in outputs for choice in output.outputs for token in choice.token_ids]
    if not outputs or not outputs[-1].finished or len(drawn) != wanted.max_tokens:
        raise TapError(f"{len(drawn)} tokens came of {wanted.max_tokens} that an answer was to have")
    if list(outputs[-1].prompt_token_ids) != _PROMPT[:1]:
        raise TapError("tokens of an answer are taken for its prompt")
