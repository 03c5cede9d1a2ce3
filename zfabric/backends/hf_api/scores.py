"""Log probabilities in the shapes of the protocols. Most servers tell no ids: those are then -1."""

from __future__ import annotations

from typing import Any, Final

from zfabric.wire.payloads import Logprob, TokenLogprobs

_UNKNOWN: Final = -1


def logprobs_of(told: dict[str, Any] | None, ids: list[int]) -> list[TokenLogprobs] | None:
    """Of chat completions ("content") or of completions ("tokens")."""
    if not told:
        return None
    if "content" in told:
        return [_chat_entry(entry, _at(ids, place)) for place, entry in enumerate(told["content"] or ())]
    tops = told.get("top_logprobs") or ()
    entries: list[TokenLogprobs] = []
    for place, (text, value) in enumerate(zip(told["tokens"], told["token_logprobs"], strict=True)):
        top = tops[place] if place < len(tops) else None
        alternatives = [Logprob(_UNKNOWN, float(score), token) for token, score in (top or {}).items()]
        alternatives.sort(key=lambda item: -item.logprob)
        entries.append(TokenLogprobs(Logprob(_at(ids, place), _number(value), str(text)), alternatives))
    return entries


def tgi_logprobs(token: dict[str, Any], top: list[dict[str, Any]] | None) -> list[TokenLogprobs]:
    """Of text generation inference, which tells ids of all."""
    return [TokenLogprobs(_tgi_entry(token), [_tgi_entry(entry) for entry in top or ()])]


def _tgi_entry(entry: dict[str, Any]) -> Logprob:
    return Logprob(int(entry["id"]), _number(entry.get("logprob")), str(entry.get("text", "")))


def _chat_entry(entry: dict[str, Any], token_id: int) -> TokenLogprobs:
    top = [Logprob(_UNKNOWN, float(item["logprob"]), str(item["token"])) for item in entry.get("top_logprobs") or ()]
    return TokenLogprobs(Logprob(token_id, float(entry["logprob"]), str(entry["token"])), top)


def _at(ids: list[int], place: int) -> int:
    return ids[place] if place < len(ids) else _UNKNOWN


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)
