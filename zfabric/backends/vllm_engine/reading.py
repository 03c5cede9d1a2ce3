"""What tells reasoning and calls from an engine's text, request by request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from zfabric.backends.front.parsing import AnswerFormat, AnswerReader, MarkTokens, template_text
from zfabric.backends.vllm_engine.arguments import Arguments
from zfabric.backends.vllm_engine.compat.reasoning import tokenizer_of, watch_reasoning
from zfabric.backends.vllm_engine.prompts import Prompts
from zfabric.wire.payloads import Delta, FinishReason, GenerateRequest


def answer_format(arguments: Arguments) -> AnswerFormat:
    """How the model writes reasoning and calls. The engine is made to see where reasoning ends, before it starts.

    Raises:
        ConfigurationError: A parser is asked for that there is not.
    """
    tokenizer = tokenizer_of(arguments.engine)
    template = arguments.chat_template or template_text(getattr(tokenizer, "chat_template", None))
    found = AnswerFormat(template, tools=arguments.tool_parser, reasoning=arguments.reasoning_parser)
    if found.reasoning is not None and tokenizer is not None:
        watch_reasoning(arguments.engine, found.reasoning, tokenizer)
    return found


class Reading:
    """Makes readers.

    Args:
        form: How the model writes.
        prompts: Knows the tokenizer.
        tokenizer: vLLM's.
    """

    def __init__(self, form: AnswerFormat, prompts: Prompts, tokenizer: Any) -> None:
        self._form = form
        self._prompts = prompts
        self._marks = MarkTokens(form, tokenizer)

    def readers(self, request: GenerateRequest, prompt: Sequence[int], echo: str) -> list[AnswerReader]:
        """One for each choice; none where the text is all there is."""
        tail = partial(self._tail, prompt)
        made = [self._form.reader(request, tail, index=index, lead=echo) for index in range(request.sampling.n)]
        return [reader for reader in made if reader is not None]

    def marks(self, request: GenerateRequest, readers: Sequence[AnswerReader]) -> Mapping[int, str]:
        """Special tokens that readers have to see, with their texts, where the request's text lacks them."""
        return self._marks.of(readers[0]) if readers and request.sampling.skip_special_tokens else {}

    def ending(
        self, request: GenerateRequest, reader: AnswerReader, reason: FinishReason, ends: frozenset[int]
    ) -> Delta:
        """The end of an answer all tokens of which its reader has.

        Args:
            ends: Tokens that are no part of the text.
        """
        drawn = request.resume_token_ids
        shown = drawn[:-1] if reason == "stop" and drawn[-1] in ends else drawn
        text, skip = "", request.sampling.skip_special_tokens
        marks = self.marks(request, [reader])
        run: list[int] = []
        for token in [*shown, None]:
            mark = None if token is None else marks.get(token)
            if token is None or mark is not None:
                text += self._prompts.text(run, skip_special_tokens=skip) + (mark or "")
                run = []
            else:
                run.append(token)
        stop_reason: str | int | None = None
        if reason == "stop" and drawn[-1] in request.sampling.stop_token_ids:
            stop_reason = drawn[-1]
        for stop in request.sampling.stop:
            before, found, _ = text.partition(stop)
            if found:
                text, stop_reason = before, stop
        delta = Delta(text=text, finish_reason=reason, stop_reason=stop_reason)
        reader.read(delta)
        return delta

    def _tail(self, prompt: Sequence[int], count: int) -> str:
        return self._prompts.text(prompt[-count:], skip_special_tokens=False)
