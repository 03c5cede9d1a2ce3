"""What waits for a reader."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from zfabric.client.mailbox import Collector, Mailbox
from zfabric.errors import ProtocolError, RequestCancelledError
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.payloads import Logprob, TokenLogprobs, Usage


def chunk(index: int, token: int, **extra: object) -> Chunk:
    made = Chunk(1, 0, index, 0, f"{index}.{token} ", [token])
    made.extra = ChunkExtra(**extra) if extra else None  # type: ignore[arg-type]
    return made


def parts(one: Chunk) -> tuple[int, str, list[int], ChunkExtra | None]:
    """A chunk as sinks get it: lists of their own."""
    return one.index, one.text, list(one.token_ids), copy.deepcopy(one.extra)


def entry(token: int) -> TokenLogprobs:
    return TokenLogprobs(Logprob(token, -0.5, "x", 1), [Logprob(token + 1, -1.0)])


def answer(steps: int, choices: int, *, logprobs: bool = False) -> list[Chunk]:
    """Step by step a token of each choice, as an engine makes them."""
    return [
        chunk(index, step, logprobs=[entry(step)]) if logprobs else chunk(index, step)
        for step in range(steps)
        for index in range(choices)
    ]


def nothing() -> None:
    """Nobody waits."""


@pytest.mark.parametrize("late", [False, True])
def test_every_choice_is_whole_however_late_it_is_read(late: bool) -> None:
    mailbox = Mailbox(nothing, 3)
    taken = []
    for one in answer(20, 3, logprobs=True):
        mailbox.arrived(*parts(one))
        if not late:
            taken.append(mailbox.take())
    mailbox.arrived(*parts(chunk(1, 20, finish_reason="stop")))
    while mailbox.waiting:
        taken.append(mailbox.take())
    for choice in mailbox.choices:
        tokens = [*range(20), *([20] if choice.index == 1 else [])]
        assert choice.token_ids == tokens
        assert choice.text == "".join(f"{choice.index}.{token} " for token in tokens)
        own = [delta for delta in taken if delta.index == choice.index]
        assert [token for delta in own for token in delta.token_ids] == tokens
        assert choice.logprobs == [e for delta in own for e in delta.logprobs or []] == [entry(n) for n in range(20)]
    assert mailbox.choices[1].finish_reason == "stop"


def test_what_a_reader_does_to_its_deltas_is_its_own() -> None:
    mailbox = Mailbox(nothing)
    for token in range(3):
        mailbox.arrived(*parts(chunk(0, token, logprobs=[entry(token)])))
    delta = mailbox.take()
    assert delta.logprobs is not None
    delta.token_ids.clear()
    delta.logprobs.clear()
    assert mailbox.choices[0].token_ids == [0, 1, 2]
    assert mailbox.choices[0].logprobs == [entry(0), entry(1), entry(2)]


@pytest.mark.parametrize("index", [-1, 2, 2**62])
def test_a_choice_that_nobody_asked_for_is_refused(index: int) -> None:
    for sink in (Mailbox(nothing, 2), Collector(2, nothing, lambda units: None)):
        with pytest.raises(ProtocolError, match="of choice"):
            sink.arrived(*parts(chunk(index, 1)))


def test_a_collector_tells_the_units_that_chunks_have() -> None:
    told: list[int] = []
    collector = Collector(1, nothing, told.append)
    collector.arrived(*parts(Chunk(1, 0, 0, 0, "abc", [], ChunkExtra(units=3))))
    collector.arrived(*parts(Chunk(1, 0, 0, 3, "a", [])))
    collector.arrived(*parts(Chunk(1, 0, 0, 4, "ab", [1, 2])))
    assert told == [3, 1, 2]


def test_an_answer_that_was_closed_is_no_completion() -> None:
    mailbox = Mailbox(nothing)
    mailbox.arrived(*parts(chunk(0, 1)))
    mailbox.ended(None, Outcome(usage=Usage(1, 1)))
    mailbox.discard()
    with pytest.raises(RequestCancelledError):
        mailbox.completion("r", "m")
    mailbox = Mailbox(nothing)
    mailbox.ended(None, Outcome(usage=Usage(1, 0)))
    mailbox.discard()
    assert mailbox.completion("r", "m").usage.total_tokens == 1


def test_a_completion_is_plain_values() -> None:
    collector = Collector(2, nothing, lambda units: None)
    collector.arrived(*parts(chunk(0, 5, worker="w", logprobs=[entry(5)], prompt_logprobs=[None, entry(1)])))
    collector.arrived(*parts(chunk(1, 6, finish_reason="length")))
    collector.ended(None, Outcome(usage=Usage(3, 2, 1)))
    found = collector.completion("ab", "m").to_dict()
    logprob = {"token_id": 5, "logprob": -0.5, "text": "x", "rank": 1}
    top = [{"token_id": 6, "logprob": -1.0, "text": "", "rank": None}]
    rest: dict[str, Any] = {"reasoning": "", "tool_calls": [], "stop_reason": None}
    assert found == {
        "request_id": "ab",
        "model": "m",
        "worker": "w",
        "choices": [
            {"index": 0, "text": "0.5 ", "token_ids": [5], "finish_reason": None, "logprobs": [{**logprob, "top": top}], **rest},
            {"index": 1, "text": "1.6 ", "token_ids": [6], "finish_reason": "length", "logprobs": None, **rest},
        ],
        "usage": {
            "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1, "estimated": False, "total_tokens": 5,
        },
        "prompt_logprobs": [None, {**logprob, "token_id": 1, "top": [{**top[0], "token_id": 2}]}],
        "extra": {},
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found
