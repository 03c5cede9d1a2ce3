"""Answers in the making: from vLLM's outputs to deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from zfabric.backends.front.continuation import Redraw
from zfabric.backends.front.parsing import AnswerReader
from zfabric.errors import BackendError, WorkerDrainingError
from zfabric.wire.payloads import Delta, FinishReason, GenerateRequest, Logprob, TokenLogprobs, Usage

#: vLLM's reasons to finish → the fabric's. Whatever is not here is a failure.
_REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length", "repetition": "stop"}


class Answer:
    """One request in the engine.

    Args:
        request: As it came.
        prompt_tokens: Tokens of its prompt, without those of the answer.
        echo: Text that the answer begins with.
        redraw: The engine draws the answer anew from its first token; what the reader has is checked and left out.
        tries: How often it may be asked for once more, when the engine turns out to lack an image.
        headers: By which the engine goes on with the request's trace.
        readers: What tells reasoning and calls from the text of each choice, which begins with the echo there; none for a text
            that is nothing else.
    """

    __slots__ = (
        "_completion_tokens", "_lacking", "_leads", "_plain", "_readers", "_redraw", "_top", "_top_prompt", "headers",
        "prompt_tokens", "request", "tries",
    )  # fmt: skip

    def __init__(
        self,
        request: GenerateRequest,
        prompt_tokens: int,
        *,
        echo: str = "",
        redraw: bool = False,
        tries: int = 0,
        headers: dict[str, str] | None = None,
        readers: Sequence[AnswerReader] = (),
    ) -> None:
        drawn = request.resume_token_ids
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.tries = tries
        self.headers = headers or {}
        self._lacking = False
        self._top = request.sampling.logprobs
        self._top_prompt = request.sampling.prompt_logprobs
        self._completion_tokens = 0 if redraw else len(drawn)
        self._readers = readers
        # A reader leaves out by itself what has been seen of its text.
        self._redraw = Redraw(request, characters=0 if readers else None) if redraw else None
        # Of an answer that goes on in the engine, the text does so where the reader stands; only the echo is ours.
        lead = echo if redraw else echo[request.resume_characters :]
        self._leads = dict.fromkeys(range(request.sampling.n), lead) if lead and not readers else {}
        # Of the whole answer, so that no step has one of its tokens as a delta before another that is plain.
        simple = request.sampling.n == 1 and not (self._leads or readers or redraw)
        self._plain = simple and self._top is self._top_prompt is None

    def plain_token(self, output: Any) -> tuple[int, str] | None:
        """What one `RequestOutput` adds, where that is a token and its text and nothing else; None where `deltas` has to say."""
        if not self._plain or output.finished or len(output.outputs) != 1:
            return None
        (choice,) = output.outputs
        if len(choice.token_ids) != 1 or choice.finish_reason is not None:
            return None
        self._completion_tokens += 1
        return choice.token_ids[0], choice.text

    def lacks_image(self, output: Any) -> bool:
        """Whether the engine gave up on this before it drew anything.

        vLLM sends an image once, and then only its hash; of a request that was refused or cancelled in between, the
        image has not arrived. It notices, and will send the image with the next request that needs it.
        """
        if not self._completion_tokens:
            self._lacking = self._lacking or any(choice.finish_reason == "error" for choice in output.outputs)
        return self._lacking

    def deltas(self, output: Any) -> list[Delta]:
        """What one `RequestOutput` adds.

        Raises:
            BackendError: The engine gave up, or drew something else than the reader has.
            WorkerDrainingError: The engine stopped it for a reason of its own; it may go on elsewhere.
        """
        found = [delta for choice in output.outputs if (delta := self._delta(choice)) is not None]
        if output.prompt_logprobs and self._top_prompt is not None and found:
            found[0].prompt_logprobs = _prompt_entries(output, self._top_prompt)
        if output.finished:
            cached = min(output.num_cached_tokens or 0, self.prompt_tokens)
            found[-1].usage = Usage(self.prompt_tokens, self._completion_tokens, cached)
            if output.kv_transfer_params:
                found[-1].extra = {"kv_transfer_params": dict(output.kv_transfer_params)}
        return found

    def _delta(self, choice: Any) -> Delta | None:
        token_ids = choice.token_ids
        self._completion_tokens += len(token_ids)
        delta = Delta(text=choice.text, token_ids=token_ids, index=choice.index)
        if choice.finish_reason is not None:
            delta.finish_reason, delta.stop_reason = _reason(choice.finish_reason), choice.stop_reason
        if self._leads:
            delta.text = self._leads.pop(choice.index, "") + delta.text
        if self._top is not None and choice.logprobs is not None:
            lines = zip(token_ids, choice.logprobs, strict=True)
            delta.logprobs = [_entry(token, line, self._top) for token, line in lines]
        if self._readers:
            self._readers[choice.index].read(delta)
        if self._redraw is not None and not self._redraw.leave_out(delta):
            return None
        return delta


def _reason(name: str) -> FinishReason:
    reason = _REASONS.get(name)
    if reason is not None:
        return reason
    if name == "abort":
        raise WorkerDrainingError("the engine stopped this request")
    raise BackendError(f"the engine ended this request with {name!r}", finish_reason=name)


def _entry(token: int, line: Mapping[int, Any], top: int) -> TokenLogprobs:
    """One position's entry. Beside the `top` likeliest, vLLM's line holds the drawn token."""
    ranked = sorted((known.rank, other, known) for other, known in line.items() if known.rank <= top)
    return TokenLogprobs(_logprob(token, line[token]), [_logprob(other, known) for _, other, known in ranked])


def _logprob(token: int, known: Any) -> Logprob:
    return Logprob(token, float(known.logprob), known.decoded_token or "", known.rank)


def _prompt_entries(output: Any, top: int) -> list[TokenLogprobs | None]:
    tokens: Sequence[int] = output.prompt_token_ids
    return [line and _entry(token, line, top) for token, line in zip(tokens, output.prompt_logprobs, strict=True)]
