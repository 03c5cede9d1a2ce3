"""A stream at its worker against a reader that keeps to the protocol: credit, repeats, and sizes, in any order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.worker_side import WorkerSide
from zfabric import limits
from zfabric.wire.answers import Chunk
from zfabric.wire.payloads import Delta, Logprob, TokenLogprobs


class Reader:
    """Takes chunks as a client does, and checks their order and the window."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.units = 0
        self.text: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.scores: list[TokenLogprobs] = []
        self.reasons: list[int] = []

    def take(self, chunks: list[Chunk], *, ended: bool) -> None:
        for chunk in chunks:
            assert chunk.offset == self.units
            extra = chunk.extra
            self.units += len(chunk.token_ids) if extra is None or extra.units is None else extra.units
            self.text[chunk.index] = self.text.get(chunk.index, "") + chunk.text
            self.tokens[chunk.index] = self.tokens.get(chunk.index, []) + chunk.token_ids
            if extra is not None:
                self.scores += extra.logprobs or []
                if extra.finish_reason is not None:
                    self.reasons.append(chunk.index)
        assert ended or self.units <= self.window


deltas = st.tuples(st.integers(0, 1), st.text(max_size=3), st.integers(0, 9))
moves = st.lists(st.one_of(deltas, st.tuples(st.just("credit"), st.integers(0, 7)), st.just("again")), max_size=40)


@settings(max_examples=150, deadline=None)
@given(moves, st.integers(0, 6), st.booleans(), st.sampled_from([1, 3]))
def test_a_reader_gets_everything_once_in_order_and_as_soon_as_it_may(
    moves: list[object], window: int, scored: bool, interval: int
) -> None:
    side = WorkerSide(stream_interval=interval)
    name = side.begin(1, window=window, n=2)
    reader = Reader(window)
    text, tokens = {0: "", 1: ""}, {0: list[int](), 1: list[int]()}
    made = count = 0
    for move in [*moves, "end"]:
        ended = move == "end"
        if ended:
            side.emit((name, Delta(finish_reason="stop")), (name, Delta(index=1, finish_reason="stop")))
            made += 2
        elif move == "again":
            side.grant(1, reader.units, reader.window, again=True)
        elif isinstance(move, tuple) and move[0] == "credit":
            reader.window = max(reader.window, reader.units + move[1])
            side.grant(1, reader.units, reader.window)
        else:
            assert isinstance(move, tuple)
            index, said, size = move
            ids = list(range(count, count + size))
            count += size
            scores = [TokenLogprobs(token=Logprob(n, -1.0)) for n in ids] if scored else None
            side.emit((name, Delta(text=said, token_ids=list(ids), index=index, logprobs=scores)))
            made += size or 1
            text[index] += said
            tokens[index] += ids
        reader.take(side.heard().chunks, ended=ended)
        held = min(made, reader.window) - reader.units
        # Only a stream interval may hold back what credit allows.
        assert ended or held <= 0 or made - reader.units < interval
    assert (reader.units, sorted(reader.reasons)) == (made, [0, 1])
    assert {index: reader.text.get(index, "") for index in text} == text
    assert {index: reader.tokens.get(index, []) for index in tokens} == tokens
    assert [score.token.token_id for score in reader.scores] == (list(range(count)) if scored else [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4_000), st.integers(1, 5)), min_size=1, max_size=40))
def test_no_message_is_larger_than_its_receiver_takes(answers: list[tuple[int, int, int]]) -> None:
    """`heard` looks at every frame. What a single unit needs is below the bound here, so nothing fails."""
    side = WorkerSide(frame_bytes_max=limits.HEADER_BYTES_MAX + 200)
    names = {number: side.begin(number, window=0) for number in range(4)}
    expected = dict.fromkeys(names, "")
    for number, length, size in answers:
        text = str(number) * length
        assert side.emit((names[number], Delta(text=text, token_ids=[1] * size))) == []
        expected[number] += text
    for number in (0, 1):
        assert side.grant(number, 0, 10_000) == []
    for number in (2, 3):
        assert side.emit((names[number], Delta(finish_reason="stop"))) == []
    heard = side.heard()
    for number in names:
        assert "".join(chunk.text for chunk in heard.chunks if chunk.request == number) == expected[number]
    assert sorted(end.request for end in heard.ends) == [2, 3]
    assert {end.code for end in heard.ends} == {0}
