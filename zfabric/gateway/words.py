"""Parts of answers that several APIs have: counts of tokens, and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from zfabric.client.results import Choice, Completion
from zfabric.wire.payloads import Delta, Logprob, TokenLogprobs


def usage_object(completions: Iterable[Completion]) -> dict[str, Any]:
    """Counts of all requests together, as OpenAI's API has them."""
    counts = [completion.usage for completion in completions]
    prompt = sum(count.prompt_tokens for count in counts)
    completion = sum(count.completion_tokens for count in counts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(count.cached_tokens for count in counts)},
    }


#: Fields of answers that the gateway itself fills.
_OWN: Final = frozenset({"id", "object", "created", "model", "choices", "usage"})


def besides(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine told besides, as fields of an answer: they are called as the engine's own API calls them."""
    return {name: value for name, value in extra.items() if name not in _OWN}


def all_besides(completions: Iterable[Completion]) -> dict[str, Any]:
    """The same of whole answers. OpenAI's has a fingerprint in any case."""
    found: dict[str, Any] = {"system_fingerprint": None}
    for completion in completions:
        found |= besides(completion.extra)
    return found


def stopped_by(ended: Delta | Choice) -> dict[str, Any]:
    """The text or token of the caller's that ended a choice, as vLLM's server tells it; nothing where none did."""
    return {} if ended.stop_reason is None else {"stop_reason": ended.stop_reason}


def chat_logprobs(entries: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
    """Log-probabilities as chats have them: https://platform.openai.com/docs/api-reference/chat/object."""
    return {
        "content": [
            {**_entry(entry.token), "top_logprobs": [_entry(other) for other in entry.top[:top]]} for entry in entries
        ],
        "refusal": None,
    }


def _entry(logprob: Logprob) -> dict[str, Any]:
    return {"token": logprob.text, "logprob": logprob.logprob, "bytes": list(logprob.text.encode())}


class OldLogprobs:
    """Log-probabilities as /v1/completions has them (https://platform.openai.com/docs/api-reference/completions/object), of one
    choice, bit by bit: offsets count characters of its text from its begin."""

    def __init__(self) -> None:
        self._offset = 0

    def of(self, entries: Sequence[TokenLogprobs | None], text: str = "") -> dict[str, Any]:
        """What comes next. None is the first token of a prompt, which nothing predicts; it is what `text`, that of all
        entries together, has before the others."""
        others = "".join(entry.token.text for entry in entries if entry is not None)
        first = text.removesuffix(others) if text.endswith(others) else ""
        said: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = entry.token.text if entry is not None else first
            said["tokens"].append(token)
            said["token_logprobs"].append(entry.token.logprob if entry is not None else None)
            # The token itself is always among them, so there may be one more than was asked for.
            tops = {one.text: one.logprob for one in (*entry.top, entry.token)} if entry is not None else None
            said["top_logprobs"].append(tops)
            said["text_offset"].append(self._offset)
            self._offset += len(token)
        return said
