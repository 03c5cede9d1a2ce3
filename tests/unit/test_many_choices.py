"""An answer of many choices costs its client in proportion to what arrives, however much has come before.

Lines of the client that run are counted, so nothing here depends on a machine. What a single line could hide is a copy of what is
kept: lists grow in place, which their identity tells, and texts are joined once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import zfabric.client
import zfabric.core.client
from tests.unit.test_client_session import Wire
from zfabric.client.blocking import SharedMailbox
from zfabric.client.mailbox import Collector, Mailbox
from zfabric.core.client.pending import Pending, Sink
from zfabric.wire import codec
from zfabric.wire.answers import Chunk, ChunkExtra
from zfabric.wire.payloads import Logprob, TextRequest, TokenLogprobs
from zfabric.wire.sampling import SamplingOptions

CLIENT = tuple(str(Path(module.__file__ or "").parent) for module in (zfabric.client, zfabric.core.client))
CHOICES, STEPS = 16, 4_000
#: Lines of Python that one chunk of an answer may take, of a reader that comes late and joins what waits included.
LINES_PER_CHUNK = 80


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts lines of the client that run."""
    count = [0]

    def local(frame: FrameType, event: str, argument: object) -> Any:
        count[0] += event == "line"
        return local

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return local if frame.f_code.co_filename.startswith(CLIENT) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def step_of(pending: Pending, step: int, *, logprobs: bool) -> codec.Frames:
    """What an engine's step says: a token of each choice."""
    entry = TokenLogprobs(Logprob(step, -0.5), [Logprob(step, -0.5), Logprob(step + 1, -1.0)])
    extra = ChunkExtra(logprobs=[entry]) if logprobs else None
    first = step * CHOICES
    chunks = [Chunk(pending.number, 0, n, first + n, f"{step} ", [step], extra) for n in range(CHOICES)]
    return codec.pack_chunks(3, chunks)


def asked(wire: Wire, sink: Sink) -> Pending:
    request = TextRequest(prompt="p", sampling=SamplingOptions(n=CHOICES, temperature=0.5))
    return wire.session.submit("generate", request, sink, wire.now_ns, model="m", window=CHOICES * STEPS)


def nothing() -> None:
    """Nobody waits."""


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["async", "blocking", "collector"])
def test_the_last_step_costs_what_an_early_one_did(kind: str, late: bool, logprobs: bool) -> None:
    wire = Wire()
    wire.up()
    mailbox = SharedMailbox(CHOICES) if kind == "blocking" else Mailbox(nothing, CHOICES)
    sink = Collector(CHOICES, nothing, lambda units: None) if kind == "collector" else mailbox
    pending = asked(wire, sink)

    def heard(step: int) -> None:
        wire.hear(step_of(pending, step, logprobs=logprobs))
        while mailbox.waiting and not late:
            mailbox.take()

    costs = []
    for step in range(STEPS):
        if step not in (10, STEPS - 1):
            heard(step)
            continue
        with counted() as count:
            heard(step)
        costs.append(count[0])
    early, last = costs
    assert CHOICES < early == last < LINES_PER_CHUNK * CHOICES
    with counted() as count:
        while mailbox.waiting:
            mailbox.take()
    assert count[0] < LINES_PER_CHUNK * CHOICES * STEPS
    answer = sink if isinstance(sink, Collector) else mailbox
    for choice in answer.choices:
        assert choice.token_ids == list(range(STEPS))
        assert choice.text == "".join(f"{step} " for step in range(STEPS))
        assert len(choice.logprobs or ()) == (STEPS if logprobs else 0)


def test_what_is_kept_grows_where_it_is() -> None:
    """A copy at each chunk is a single line, and costs as much as all that came before."""
    wire = Wire()
    wire.up()
    mailbox = Mailbox(nothing)
    pending = asked(wire, mailbox)

    def heard(offset: int) -> None:
        entry = TokenLogprobs(Logprob(offset, -0.5), [])
        chunk = Chunk(pending.number, 0, 0, offset, f"{offset} ", [offset], ChunkExtra(logprobs=[entry]))
        wire.hear(codec.pack_chunks(3, [chunk]))

    heard(0)
    (waits,) = mailbox.waiting
    kept = waits.token_ids, waits.logprobs, pending.token_ids
    for offset in range(1, 100):
        heard(offset)
    assert [waits] == list(mailbox.waiting)
    assert all(
        now is then for now, then in zip((waits.token_ids, waits.logprobs, pending.token_ids), kept, strict=True)
    )
    assert waits.text == "0 "
    mailbox.take()
    (choice,) = mailbox.choices
    tokens, logprobs = choice.token_ids, choice.logprobs
    for offset in range(100, 200):
        heard(offset)
        mailbox.take()
    assert choice.token_ids is tokens
    assert choice.logprobs is logprobs
    assert choice.text == "".join(f"{offset} " for offset in range(200))
