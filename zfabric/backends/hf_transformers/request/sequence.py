"""One answer in the making: a request's choice with its tokens, text and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zfabric.backends.front.detokenizer import Detokenizer
from zfabric.backends.front.parsing import AnswerReader
from zfabric.backends.front.stop_strings import StopStrings
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.request.best_of import BestOf
from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.request.structured_outputs import Guide
from zfabric.errors import FabricError
from zfabric.wire.payloads import Delta, FinishReason, GenerateRequest, TokenLogprobs, Usage


class Answer:
    """What the choices of one request share.

    Attributes:
        prompt: The tokens that its text goes on from, once they are known.
        source: The tokens that an encoder reads before; none for a model without one.
        encoded: Whether it has read them already.
        media: Images and the like, as arguments of the model.
        media_key: What tells these from others.
        pictures: How many images there are.
        shift: What its positions after images are off from columns; the images' own have more than one dimension.
        adapter: What is added to the model's weights for it.
        prompt_logprobs: Entries so far, to go out with the first token; None if none are wanted (any more).
        choices: How many are drawn.
        best_of: Decides which of them are given; None if all are.
        cancelled: Set by the event loop: nothing more is wanted.
        over: Set by the engine: it has ended, well or not.
        suspect: It was among several prompts that could not be computed, so its own is tried alone.
        overtaken: How often others behind it in line went before it.
        plain: Whether each of its deltas but the last is a token and its text.
        cached_tokens: Of its prompt's tokens, those that the cache had when it first came; None before.
    """

    __slots__ = (
        "adapter",
        "best_of",
        "cached_tokens",
        "cancelled",
        "choices",
        "completion_tokens",
        "encoded",
        "media",
        "media_key",
        "open_choices",
        "over",
        "overtaken",
        "pictures",
        "plain",
        "prompt",
        "prompt_logprobs",
        "request",
        "shift",
        "source",
        "suspect",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.prompt: list[int] = []
        self.source: list[int] = []
        self.encoded = False
        self.media: dict[str, Any] | None = None
        self.media_key = ""
        self.pictures = 0
        self.shift = 0
        self.adapter: Adapter | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        sampling = request.sampling
        if sampling.prompt_logprobs is not None and not request.resume_token_ids:
            self.prompt_logprobs = []
        self.choices = self.open_choices = max(sampling.n, sampling.best_of or 0)
        self.best_of: BestOf | None = None
        if sampling.use_beam_search:
            self.open_choices = sampling.n
        elif self.choices > sampling.n:
            self.best_of = BestOf(sampling.n, self.choices, show_logprobs=sampling.logprobs is not None)
        self.plain = sampling.single and sampling.logprobs is None and self.prompt_logprobs is None
        self.completion_tokens = 0
        self.cancelled = False
        self.over = False
        self.suspect = False
        self.overtaken = 0
        self.cached_tokens: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not (self.cancelled or self.over)

    @property
    def prompt_tokens(self) -> int:
        """What the caller's prompt has."""
        return len(self.source) or len(self.prompt)

    @property
    def alone(self) -> bool:
        """Whether its prompt has a pass of its own."""
        pictures = self.media is not None and not self.source
        return self.prompt_logprobs is not None or pictures or self.suspect


class Sequence:
    """One choice. It knows no model: it is given tokens, and says what to show.

    Args:
        answer: The request it belongs to.
        index: Which choice.
        limit: Tokens of the answer at most.
        seed: Of this choice.
        end_tokens: Tokens that end it.
        bad_words: Token sequences that must not appear.
        suppressed: Tokens that never come, and those that do not begin it.
        tokenizer: A transformers tokenizer.
        echo: The text to begin with, None for none.
        guide: What its text has to follow.
        reader: Tells reasoning and calls from its text, which begins with `echo` there; None for a text that is nothing else.
        marks: Special tokens that the reader has to see, with their texts.
        forced: At these places one of these tokens comes.
    """

    __slots__ = (
        "_detokenizer", "_mute", "_owed", "_reader", "_skip", "_stops", "_versions", "answer", "end_tokens", "index", "limit",
        "output", "row",
    )  # fmt: skip

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
        suppressed: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset()),
        echo: str | None = None,
        guide: Guide | None = None,
        reader: AnswerReader | None = None,
        marks: Mapping[int, str] | None = None,
        forced: Mapping[int, frozenset[int]] | None = None,
    ) -> None:
        sampling = answer.request.sampling
        self.answer = answer
        self.index = index
        self.limit = limit
        self.end_tokens = end_tokens
        self.output: list[int] = []
        extra = answer.request.extra
        allowed = tuple(extra.get("allowed_token_ids", ()))
        self.row = Row(
            sampling, seed, answer.prompt, self.output, end_tokens, bad_words, guide, suppressed, allowed, forced or {}
        )
        if sampling.logprobs is None and answer.best_of is not None:
            self.row.alternatives = 0
        self._mute = extra.get("detokenize") is False
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=sampling.skip_special_tokens, marks=marks)
        if echo is not None:
            self._detokenizer.go_on_after(answer.prompt)
        shown = bool(extra.get("include_stop"))
        self._stops = StopStrings(sampling.stop, free=sampling.min_new_tokens, shown=shown)
        self._reader = reader
        #: Which weights drew its tokens, each with the first of them.
        self._versions: list[tuple[str, int]] = []
        #: Text that goes out with the next token.
        self._owed = "" if reader is not None else echo or ""
        self._skip = answer.request.resume_characters if index == 0 and reader is None else 0
        if reader is not None:
            answer.plain = False
            if guide is not None:
                guide.waits = not reader.answers

    @property
    def failure(self) -> FabricError | None:
        """Why it cannot go on."""
        guide = self.row.guide
        return None if guide is None else guide.failure

    @property
    def size(self) -> int:
        """Cells that it takes when it joins."""
        return len(self.answer.source) + len(self.answer.prompt) + len(self.output)

    @property
    def uncomputed(self) -> int:
        """Tokens to compute before its next draw: those of what an encoder reads, and its own."""
        return self.size - self.answer.encoded * len(self.answer.source)

    def tokens(self) -> list[int]:
        """All that the model has to have read before the next token can be drawn."""
        return [*self.answer.prompt, *self.output]

    def resume(self, tokens: list[int]) -> Delta | None:
        """Take up tokens that the reader has. A delta if they leave nothing to compute.

        Text of these tokens that the reader lacks goes out with the next token.
        """
        missing = ""
        self._hold(held=True)
        for token in tokens:
            delta = self.take(token, None)
            missing += delta.text
            if delta.finish_reason is not None:
                delta.token_ids = []
                delta.text = missing
                return delta
        self._hold(held=False)
        self._owed = missing
        return None

    def _hold(self, *, held: bool) -> None:
        """Whether what is read is kept for later."""
        if self._reader is not None:
            self._reader.held = held

    def take(self, token: int, logprobs: TokenLogprobs | None) -> Delta:
        """Enter a drawn token. The delta's `finish_reason` says whether it was the last."""
        self.output.append(token)
        ended = token in self.end_tokens
        text, stopped = self._stops.add("" if ended or self._mute else self._detokenizer.add(token))
        reason: FinishReason | None = None
        guide = self.row.guide
        whole = not ended and guide is not None and guide.take(token)
        if ended and len(self.output) == self.limit and self.limit - 1 in self.row.forced:
            # This end was none of the model's.
            reason = "length"
        elif ended or stopped or whole:
            reason = "stop"
        elif len(self.output) >= self.limit:
            reason = "length"
        if reason is not None and not stopped:
            rest, stopped = self._stops.add(self._detokenizer.finish(), 0)
            text += rest
            if stopped:
                reason = "stop"
            else:
                text += self._stops.finish()
        delta = Delta(text=self._unseen(text), token_ids=[token], index=self.index, finish_reason=reason)
        if reason == "stop":
            named = token in self.answer.request.sampling.stop_token_ids
            delta.stop_reason = self._stops.found if stopped else token if ended and named else None
        if self._reader is not None:
            self._reader.read(delta)
            if guide is not None and guide.waits:
                guide.waits = not self._reader.answers
        if logprobs is not None:
            delta.logprobs = [logprobs]
        if self.answer.prompt_logprobs is not None:
            delta.prompt_logprobs, self.answer.prompt_logprobs = self.answer.prompt_logprobs, None
        if reason is not None:
            self._close(delta)
        return delta

    def drawn_by(self, version: str, delta: Delta) -> None:
        """Say which weights drew a delta's token: with the first that they drew, and with the last of all."""
        begins = not self._versions or self._versions[-1][0] != version
        if begins:
            self._versions.append((version, len(self.output) - 1))
        if begins or delta.finish_reason is not None:
            self._tell_versions(delta)

    def _tell_versions(self, delta: Delta) -> None:
        if not self._versions:
            return
        delta.extra = {**(delta.extra or {}), "weight_version": self._versions[-1][0]}
        if delta.finish_reason is not None:
            ends = [*(start for _, start in self._versions[1:]), len(self.output)]
            delta.extra["weight_versions"] = [
                {"version": version, "start": start, "end": end}
                for (version, start), end in zip(self._versions, ends, strict=True)
            ]

    def abort(self) -> Delta:
        """End here, with what was drawn so far."""
        text, stopped = self._stops.add(self._detokenizer.finish(), 0)
        if not stopped:
            text += self._stops.finish()
        delta = Delta(text=self._unseen(text), index=self.index, finish_reason="abort")
        if self._reader is not None:
            self._reader.read(delta)
        self._tell_versions(delta)
        self._close(delta)
        return delta

    def _close(self, delta: Delta) -> None:
        answer = self.answer
        answer.open_choices -= 1
        answer.completion_tokens += len(self.output)
        if not answer.open_choices:
            delta.usage = Usage(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens or 0)

    def _unseen(self, text: str) -> str:
        """What is owed and this, without what the reader has from an earlier attempt."""
        text = self._owed + text
        self._owed = ""
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        return text[skipped:]
