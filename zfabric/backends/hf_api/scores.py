"""Log probabilities in the shapes of the protocols. Most servers tell no ids of alternatives: those are then -1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from zfabric.backends.hf_api.events import shown
from zfabric.wire.payloads import Logprob, TokenLogprobs

_UNKNOWN: Final = -1
#: How vLLM names a token when it is asked for ids instead of texts.
_ID_MARK: Final = "token_id:"

#: The text of a token; None where names are texts already.
TextOf = Callable[[int], str] | None


def logprobs_of(
    told: dict[str, Any] | None, ids: list[int], wanted: int, text_of: TextOf = None
) -> list[TokenLogprobs] | None:
    """Of chat completions ("content") or of completions ("tokens").

    Args:
        told: As the server put it.
        ids: The drawn tokens, as far as they are known.
        wanted: Alternatives per token; completions tell one more where the drawn token is none of them.
        text_of: Given if the server was asked for ids.
    """
    if not told:
        return None
    if "content" in told:
        lines = [
            (
                entry["token"],
                entry["logprob"],
                [(top["token"], top["logprob"]) for top in entry.get("top_logprobs") or ()],
            )
            for entry in told["content"] or ()
        ]
    else:
        tops = [list((top or {}).items()) for top in told.get("top_logprobs") or ()]
        tops += [[]] * (len(told["tokens"]) - len(tops))
        lines = list(zip(told["tokens"], told["token_logprobs"], tops, strict=True))
    entries: list[TokenLogprobs] = []
    for place, (name, value, alternatives) in enumerate(lines):
        drawn = _entry(name, value, text_of, ids[place] if place < len(ids) else _UNKNOWN)
        top = sorted((_entry(*other, text_of) for other in alternatives), key=lambda item: -item.logprob)
        entries.append(TokenLogprobs(drawn, top[:wanted]))
    return entries


def tgi_logprobs(token: dict[str, Any], top: list[dict[str, Any]] | None) -> list[TokenLogprobs]:
    """Of text generation inference, which tells ids of all."""
    return [TokenLogprobs(_tgi_entry(token), [_tgi_entry(entry) for entry in top or ()])]


def _tgi_entry(entry: dict[str, Any]) -> Logprob:
    return Logprob(int(entry["id"]), _number(entry.get("logprob")), shown(str(entry.get("text", ""))))


def _entry(name: str, value: Any, text_of: TextOf, token_id: int = _UNKNOWN) -> Logprob:
    if text_of is not None and name.startswith(_ID_MARK):
        token_id = int(name.removeprefix(_ID_MARK))
        name = text_of(token_id)
    return Logprob(token_id, _number(value), shown(str(name)))


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)
