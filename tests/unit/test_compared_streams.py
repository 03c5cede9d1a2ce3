"""The comparison with vLLM's server does not depend on how many tokens a server puts into one event."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.compatibility.cases import CASES
from tests.compatibility.compare import differences
from tests.compatibility.observe import Observed, of_events

_TOKENS = ("a", "", "b", " c", "")
_CASE = CASES[0]


def _event(tokens: tuple[str, ...], *, last: bool, chat: bool) -> dict[str, Any]:
    """A server's event for tokens that were made since the one before."""
    text = "".join(tokens)
    return {
        "id": "x",
        "choices": [
            {
                "index": 0,
                **({"delta": {"content": text}} if chat else {"text": text}),
                "finish_reason": "length" if last else None,
                "stop_reason": None,
            }
        ],
    }


def _stream(cuts: list[int], *, alone: bool, chat: bool) -> Observed:
    """A stream whose events end after these tokens.

    Args:
        alone: Whether the reason of the end has an event of its own.
    """
    events = (
        [{"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}] if chat else []
    )
    ends = sorted({*cuts, len(_TOKENS)})
    for start, end in zip([0, *ends], ends, strict=False):
        events.append(_event(_TOKENS[start:end], last=end == len(_TOKENS) and not alone, chat=chat))
    if alone:
        events.append(_event((), last=True, chat=chat))
    lines = [*map(json.dumps, events), "[DONE]"]
    return of_events(200, "".join(f"data: {line}\n\n" for line in lines))


@given(
    st.lists(st.integers(1, len(_TOKENS))),
    st.lists(st.integers(1, len(_TOKENS))),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_merged_events_are_no_difference(
    one: list[int], other: list[int], alone: bool, merged: bool, chat: bool
) -> None:
    theirs, ours = _stream(one, alone=alone, chat=chat), _stream(other, alone=merged, chat=chat)
    assert differences(_CASE, theirs, ours) == []


def test_another_order_is_a_difference() -> None:
    theirs = _stream([], alone=True, chat=True)
    early = _event(("a",), last=True, chat=True)
    late = _event(("b",), last=False, chat=True)
    ours = of_events(200, "".join(f"data: {json.dumps(event)}\n\n" for event in (early, late)) + "data: [DONE]\n\n")
    assert "order of choice 0" in {difference.aspect for difference in differences(_CASE, theirs, ours)}
