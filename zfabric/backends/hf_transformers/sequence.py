"""One answer in the making: a request's choice with its tokens, text and bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zfabric.backends.hf_transformers.sampling import Row
from zfabric.backends.hf_transformers.text import Detokenizer, StopStrings
from zfabric.wire.payloads import Delta, FinishReason, GenerateRequest, TokenLogprobs, Usage


class Answer:
    """What the choices of one request share."""

    __slots__ = ("cancelled", "completion_tokens", "open_choices", "prompt", "request")

    def __init__(self, request: GenerateRequest, prompt: list[int]) -> None:
        self.request = request
        self.prompt = prompt
        self.open_choices = request.sampling.n
        self.completion_tokens = 0
        self.cancelled = False


class Sequence:
    """One choice. It knows no model: it is given tokens, and says what to show.

    Args:
        answer: The request it belongs to.
        index: Which choice.
        limit: Tokens of the answer at most.
        seed: Of this choice.
        end_tokens: Tokens that end it.
        tokenizer: A transformers tokenizer.
    """

    __slots__ = ("_detokenizer", "_shown", "_skip", "_stops", "answer", "end_tokens", "index", "limit", "output", "row")

    def __init__(
        self,
        answer: Answer,
        *,
        index: int,
        limit: int,
        seed: int,
        end_tokens: frozenset[int],
        bad_words: tuple[tuple[int, ...], ...],
        tokenizer: Any,
    ) -> None:
        sampling = answer.request.sampling
        self.answer = answer
        self.index = index
        self.limit = limit
        self.end_tokens = end_tokens
        self.output: list[int] = []
        self.row = Row(sampling, seed, answer.prompt, self.output, end_tokens, bad_words)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        self._stops = StopStrings(sampling.stop)
        self._shown = 0
        self._skip = answer.request.resume_characters if index == 0 else 0

    def echo(self, decode: Callable[[list[int]], str]) -> Delta | None:
        """The prompt as the beginning of the text, if that is wanted and not shown yet."""
        if not self.answer.request.sampling.echo:
            return None
        text = self._unseen(decode(self.answer.prompt))
        return Delta(text=text, index=self.index) if text else None

    def resume(self, tokens: list[int]) -> Delta | None:
        """Take up tokens that the reader has. A delta if they leave nothing to compute."""
        for position, token in enumerate(tokens):
            delta = self.take(token, None)
            if delta.finish_reason is not None and position == len(tokens) - 1:
                delta.token_ids = []
                return delta
            if delta.text:
                # The reader lacks text of tokens that it has: give it with the next delta.
                self._skip = 0
        return None

    def take(self, token: int, logprobs: TokenLogprobs | None) -> Delta:
        """Enter a drawn token. The delta's `finish_reason` says whether it was the last."""
        self.output.append(token)
        ended = token in self.end_tokens
        piece = "" if ended else self._detokenizer.add(token)
        text, stopped = self._stops.add(piece)
        reason: FinishReason | None = None
        if ended or stopped:
            reason = "stop"
        elif len(self.output) >= self.limit:
            reason = "length"
        if reason is not None and not stopped:
            rest, stopped = self._stops.add(self._detokenizer.finish())
            text += rest
            if stopped:
                reason = "stop"
            else:
                text += self._stops.finish()
        delta = Delta(text=self._unseen(text), token_ids=[token], index=self.index, finish_reason=reason)
        if logprobs is not None:
            delta.logprobs = [logprobs]
        if reason is not None:
            self._close(delta)
        return delta

    def _close(self, delta: Delta) -> None:
        answer = self.answer
        answer.open_choices -= 1
        answer.completion_tokens += len(self.output)
        if not answer.open_choices:
            delta.usage = Usage(prompt_tokens=len(answer.prompt), completion_tokens=answer.completion_tokens)

    def _unseen(self, text: str) -> str:
        """The part of new text that the reader does not have from an earlier attempt."""
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        return text[skipped:]
