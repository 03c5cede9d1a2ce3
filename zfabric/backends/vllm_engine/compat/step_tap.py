"""All outputs of an engine's step at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final

from zfabric.backends.vllm_engine.compat.addition import Addition
from zfabric.backends.vllm_engine.compat.metrics import others_count

#: What is put in the place of the output processor's own methods.
REPLACED: Final = ("process_outputs", "add_request", "update_scheduler_stats", "propagate_error")


class StepTap:
    """Hands out each engine step's outputs as one list, instead of one queue and one waiting task per request.

    vLLM's output processor returns the outputs of requests that have no queue as a list, which is how its synchronous
    engine works. So generations are registered without a queue, and what it returns is collected until the step's
    last part has been processed. None of that is vLLM's public API: `tap_check` compares it with the installed version.

    Args:
        engine: An `AsyncLLM`.
        on_step: Called on the event loop with all `RequestOutput`s of a step.
        on_death: Called on the event loop when the engine will give out nothing any more.

    Attributes:
        lacking: Empty; see `OneByOne`.
        goes_on: Whether an answer can go on in the engine after tokens that its prompt ends with.
    """

    lacking = ""
    goes_on = True

    def __init__(
        self, engine: Any, on_step: Callable[[list[Any]], None], on_death: Callable[[BaseException], None]
    ) -> None:
        processor = engine.output_processor
        self._process, self._add = processor.process_outputs, processor.add_request
        self._end_of_step, self._propagate = processor.update_scheduler_stats, processor.propagate_error
        self._engine = engine
        self._processor = processor
        self.on_step = on_step
        self.on_death = on_death
        self._step: list[Any] = []
        # Traces of requests are made of the same figures.
        self._counts = others_count() or bool(processor.tracing_enabled)
        self._continued: dict[str, tuple[list[int], int]] = {}
        self._marks: dict[str, Mapping[int, str]] = {}
        own = (self._process_outputs, self._add_request, self._update_scheduler_stats, self._fail)
        for name, method in zip(REPLACED, own, strict=True):
            setattr(processor, name, method)

    def remove(self) -> None:
        """Leave the output processor as it was."""
        for name in REPLACED:
            delattr(self._processor, name)

    async def add(self, asked: Addition) -> None:
        """Hand a request to the engine.

        Raises:
            Exception: Whatever vLLM raises for it.
        """
        name = asked.request_id
        if asked.continued is not None:
            self._continued[name] = asked.continued
        if asked.marks:
            self._marks[name] = asked.marks
        try:
            await self._engine.add_request(name, asked.given, asked.parameters, **asked.arguments)
        finally:
            self._continued.pop(name, None)
            self._marks.pop(name, None)

    async def close(self) -> None:
        """Nothing runs here."""

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
            self.on_step(step)

    def _fail(self, error: Exception) -> None:
        for state in self._processor.request_states.values():
            if state.queue is not None:
                state.queue.put(error)
        self.on_death(error)

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
        marks = self._marks.get(request.external_req_id)
        state = self._processor.request_states[request.request_id] if token_ids or marks else None
        if state is not None and marks:
            _show(state.detokenizer, marks)
        if state is not None and token_ids:
            state.detokenizer.update(list(token_ids), False)
            state.detokenizer._last_output_text_offset = characters
            state.sent_tokens_offset = len(token_ids)


def _show(detokenizer: Any, marks: Mapping[int, str]) -> None:
    """Have a detokenizer that leaves special tokens out show some of them."""
    decode = detokenizer.decode_next
    detokenizer.decode_next = lambda token: decode(token) + marks.get(token, "")
