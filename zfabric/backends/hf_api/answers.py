"""From an upstream's events to deltas: text, true token ids where there are some, logprobs, usage and ends."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

import msgspec

from zfabric.backends.front.continuation import Redraw
from zfabric.backends.front.stop_strings import StopStrings
from zfabric.backends.hf_api.calls import CallReader, text_of
from zfabric.backends.hf_api.continued import Continued
from zfabric.backends.hf_api.events import HalfCharacters
from zfabric.backends.hf_api.extra import INCLUDE_STOP, Told
from zfabric.backends.hf_api.failures import from_event
from zfabric.backends.hf_api.models_file import Upstream
from zfabric.backends.hf_api.scores import logprobs_of, tgi_logprobs
from zfabric.backends.hf_api.tokens import Tokenizer
from zfabric.errors import BackendError
from zfabric.wire.payloads import Delta, FinishReason, GenerateRequest, TokenLogprobs, Usage
from zfabric.wire.tool_calls import ToolCallDelta

_REASONS: dict[str, FinishReason] = {
    "length": "length", "max_tokens": "length", "abort": "abort", "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}  # fmt: skip


class _Parts(NamedTuple):
    """What an event tells beside text."""

    reasoning: str
    calls: list[ToolCallDelta]

    @property
    def text(self) -> str:
        return self.reasoning + "".join([(call.name or "") + call.arguments for call in self.calls])


_NO_PARTS: Final = _Parts("", [])


class _Choice:
    """One choice of an answer."""

    __slots__ = ("calls", "ends", "halves", "reason", "reasoning", "stop_reason", "stops")

    def __init__(self, request: GenerateRequest, index: int) -> None:
        sampling = request.sampling
        self.halves = HalfCharacters()
        shown = bool(request.extra.get(INCLUDE_STOP))
        self.stops = StopStrings(sampling.stop, free=sampling.min_new_tokens, shown=shown)
        self.reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        #: What the caller named as ends. Servers have reasons of other kinds as well.
        ends: tuple[str | int, ...] = (*sampling.stop, *sampling.stop_token_ids)
        self.ends: dict[object, str | int] = {end: end for end in ends}
        self.reasoning = HalfCharacters()
        self.calls = CallReader(request.request_id, index)


class AnswerReader:
    """Reads one answer.

    Args:
        upstream: Whose.
        request: What is answered. Tokens in `resume_token_ids` are those that its reader has.
        goes_on: The server goes on after those tokens, which needs a tokenizer; else it draws them again.
        tokenizer: The model's.

    Attributes:
        text: All that was given out, of all choices: text, reasoning, and what calls hold.
        tokens: Tokens seen, or events where the server tells of none.
        usage: As the server reported it.
        stopped_here: Whether stop strings found here ended all choices, and the server does not know.
    """

    def __init__(
        self, upstream: Upstream, request: GenerateRequest, tokenizer: Tokenizer | None = None, *, goes_on: bool = False
    ) -> None:
        sampling = request.sampling
        self._upstream = upstream
        self._logprobs = sampling.logprobs
        self._choices = [_Choice(request, index) for index in range(sampling.n)]
        self._open = sampling.n
        self._told = 0
        self.text = ""
        self.tokens = 0
        self.usage: Usage | None = None
        self._besides = Told()
        self._continued: Continued | None = None
        self._redraw: Redraw | None = None
        self._text_of = None if tokenizer is None else tokenizer.text_of
        if goes_on:
            assert tokenizer is not None
            self._continued = Continued(tokenizer, request, self._choices[0].stops)
            self._choices[0].reason = self._continued.reason
            self._choices[0].stop_reason = self._choices[0].stops.found
            self._open -= self._continued.reason is not None
        elif request.resume_token_ids:
            self._redraw = Redraw(request)

    @property
    def ended(self) -> bool:
        """Whether every choice has ended. Usage may still come."""
        return self._open == 0

    @property
    def stopped_here(self) -> bool:
        return self._open == 0 and self._told < len(self._choices)

    def take(self, data: bytes) -> list[Delta]:
        """Deltas of one event.

        Raises:
            FabricError: The event is no JSON object of this protocol, or tells of an error.
        """
        event = self._decoded(data)
        if event.get("error"):
            raise from_event(event, self._upstream.name, self._upstream.secrets)
        try:
            deltas = self._tgi(event) if self._upstream.protocol == "tgi" else self._openai(event)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise self._garbage() from error
        if deltas:
            deltas[0].extra = self._besides.take()
        return deltas

    def finish(self, usage: Usage | None) -> list[Delta]:
        """The ends of all choices, once nothing more will come."""
        deltas: list[Delta] = []
        for index, choice in enumerate(self._choices):
            delta = Delta(index=index, finish_reason=choice.reason or "abort", stop_reason=choice.stop_reason)
            if self._continued is not None:
                delta.text = self._continued.shown("")
            elif self._redraw is not None:
                self._redraw.leave_out(delta)
            deltas.append(delta)
        deltas[-1].usage, deltas[-1].extra = usage, self._besides.take()
        return deltas

    def _decoded(self, data: bytes) -> dict[str, Any]:
        try:
            event = msgspec.json.decode(data)
        except (ValueError, RecursionError):
            # Bytes of half a character, and lone surrogates, are what the strict decoder refuses.
            try:
                event = json.loads(data.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError):
                raise self._garbage() from None
        if not isinstance(event, dict):
            raise self._garbage()
        return event

    def _garbage(self) -> BackendError:
        return BackendError(f"upstream of {self._upstream.name!r} sent an event that is not of its protocol")

    # ── protocols ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _openai(self, event: dict[str, Any]) -> list[Delta]:
        self._besides.read(event)
        if usage := event.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self.usage = Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0), int(cached))
        deltas: list[Delta] = []
        for told in event.get("choices") or ():
            index = int(told.get("index") or 0)
            if not 0 <= index < len(self._choices):
                raise self._garbage()
            choice = self._choices[index]
            reason = told.get("finish_reason")
            parts = _NO_PARTS
            if self._upstream.protocol == "chat":
                said = told.get("delta") or {}
                text = text_of(said.get("content"))
                parts = self._parts(choice, said, last=reason is not None)
            else:
                text = text_of(told.get("text"))
            ids = [int(token) for token in told.get("token_ids") or ()]
            scores = None
            if self._logprobs is not None:
                scores = logprobs_of(told.get("logprobs"), ids, self._logprobs, self._text_of)
            reason = None if reason is None else _REASONS.get(reason, "stop")
            self._add(deltas, index, text, ids, scores, reason, stop_reason=told.get("stop_reason"), parts=parts)
        return deltas

    def _parts(self, choice: _Choice, said: dict[str, Any], *, last: bool) -> _Parts:
        """What an event of a chat has beside text."""
        reasoning = choice.reasoning.add(text_of(said.get("reasoning_content") or said.get("reasoning")))
        calls = choice.calls.take(said.get("tool_calls") or [])
        if last:
            reasoning += choice.reasoning.finish()
            calls += choice.calls.finish()
        return _Parts(reasoning, calls)

    def _tgi(self, event: dict[str, Any]) -> list[Delta]:
        token = event["token"]
        special = bool(token.get("special"))
        details = event.get("details") or {}
        reason: FinishReason | None = None
        if details or event.get("generated_text") is not None:
            reason = _REASONS.get(details.get("finish_reason", ""), "stop")
            prompt_tokens = details.get("input_length") or details.get("prompt_tokens")
            if prompt_tokens:
                # Older servers do not tell it.
                self.usage = Usage(int(prompt_tokens), int(details["generated_tokens"]))
        scores = None if self._logprobs is None else tgi_logprobs(token, event.get("top_tokens"))
        deltas: list[Delta] = []
        self._add(deltas, 0, "" if special else text_of(token["text"]), [int(token["id"])], scores, reason)
        return deltas

    def _add(
        self,
        deltas: list[Delta],
        index: int,
        text: str,
        ids: list[int],
        scores: list[TokenLogprobs] | None,
        reason: FinishReason | None,
        *,
        stop_reason: object = None,
        parts: _Parts = _NO_PARTS,
    ) -> None:
        """Take what one event says of one choice; what comes after its end is dropped.

        Args:
            stop_reason: What the server says that ended the answer. Where that is no stop string, the last token did, if
                anything.
        """
        choice = self._choices[index]
        self._told += reason is not None
        if choice.reason is not None:
            return
        if text or ids or any(parts):
            self.tokens += len(ids) or 1
        if self._continued is not None:
            whole = self._continued.add(
                ids, last=reason is not None, ended=reason == "stop" and not isinstance(stop_reason, str)
            )
        else:
            whole = choice.halves.add(text)
            if reason is not None:
                whole += choice.halves.finish()
        shown, stopped = choice.stops.add(whole, len(ids) or bool(text))
        if stopped:
            reason, stop_reason = "stop", choice.stops.found
        elif reason is not None:
            shown += choice.stops.finish()
        if shown or ids or scores or any(parts):
            self.text += parts.text + shown
            delta = Delta(text=shown, token_ids=ids, index=index, logprobs=scores)
            delta.reasoning, delta.tool_calls = parts.reasoning, parts.calls or None
            if self._continued is not None:
                delta.text = self._continued.shown(shown)
            if self._redraw is None or self._redraw.leave_out(delta):
                deltas.append(delta)
        if reason is not None:
            choice.reason = reason
            choice.stop_reason = choice.ends.get(stop_reason) if isinstance(stop_reason, (str, int)) else None
            self._open -= 1
