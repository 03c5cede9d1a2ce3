"""What a controller or a backend hands over wrong costs the one request that it is about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.worker_side import INSTANCE, WorkerSide, last, token
from zfabric import limits
from zfabric.core.worker.session import Begin, Faulted, Refused, Spoiled, Stop
from zfabric.errors import (
    BackendError,
    ConfigurationError,
    FabricError,
    ProtocolError,
    TooLargeError,
    WorkerLostError,
)
from zfabric.wire import codec, kinds
from zfabric.wire.kinds import DISPATCH, Kind
from zfabric.wire.messages import CarriedMore, Drain, ModelInfo, Welcome, WorkerHello
from zfabric.wire.payloads import Delta, GenerateRequest, Logprob, TokenLogprobs, Usage
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tasks import EmbedRequest

MIB = 1024 * 1024


# ── from the controller ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("body", [b"", b"\x2f\x91\x00", codec.pack(Drain(0))[0], b"\xc1", b"\x90" * 5_000, b"\x93"])
def test_a_body_that_is_no_request_ends_its_request_and_is_not_obeyed(body: bytes) -> None:
    side = WorkerSide()
    assert side.dispatch(1, body) == []
    heard = side.heard()
    assert [(end.request, end.attempt, end.code) for end in heard.ends] == [(1, 0, ProtocolError.code)]
    assert not side.session.busy
    assert not side.session.draining
    assert side.begin(2)


@pytest.mark.parametrize(
    "envelope",
    [
        [7, INSTANCE, 5, 3],
        [7, INSTANCE, 5, 3, "no such operation", "m"],
        [7, INSTANCE, 5, 3, "generate", "m" * 5_000],
        [7, INSTANCE, 5, 3, "generate", 5],
    ],
)
def test_an_envelope_that_does_not_decode_ends_the_attempt_that_it_names(envelope: list[Any]) -> None:
    side = WorkerSide()
    header = bytes([DISPATCH]) + codec.encode(envelope)
    assert not side.session.receive(header, codec.encode(GenerateRequest(prompt="x")), 0)
    heard = side.heard()
    assert [(end.request, end.attempt, end.code) for end in heard.ends] == [(5, 3, ProtocolError.code)]
    assert not side.session.busy


@pytest.mark.parametrize(
    "content", [b"", b"\xc1", b"\x93\x07\x09\x05", b"\x94\x07\x09\x05\xa1x", b"\x94\x07\x09\x05\xff"]
)
def test_an_envelope_that_names_nothing_is_the_callers_to_count(content: bytes) -> None:
    side = WorkerSide()
    with pytest.raises(ProtocolError):
        side.session.receive(bytes([DISPATCH]) + content, b"", 0)
    assert side.begin(1)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.DISPATCH, Kind.ENDS, Kind.SUBMIT)])
def test_a_second_frame_where_there_is_none_is_no_message(kind: Kind) -> None:
    side = WorkerSide()
    name = side.begin(1)
    with pytest.raises(ProtocolError):
        side.session.receive(bytes([kind]) + b"\x91\x00", b"\x2f\x91\x00", 0)
    assert name in side.session.streams
    assert side.session.registered


def test_a_request_that_is_too_much_to_decode_is_refused_before_it_is() -> None:
    side = WorkerSide()
    for number, request in enumerate(
        (
            GenerateRequest(prompt="x " * (30 * MIB)),
            GenerateRequest(prompt_token_ids=[1] * (2 * MIB)),
            GenerateRequest(messages=[{"role": "user", "content": []}] * 20_000),
            EmbedRequest(inputs=["a"] * 100_000),
        )
    ):
        operation = "embed" if isinstance(request, EmbedRequest) else "generate"
        assert side.dispatch(number, codec.encode(request), operation=operation) == []
        assert [end.code for end in side.heard().ends] == [TooLargeError.code]
    picture = [{"role": "user", "content": [{"type": "image", "image": bytes(40 * MIB)}]}]
    (order,) = side.dispatch(9, codec.encode(GenerateRequest(messages=picture)))
    assert isinstance(order, Begin)


def test_stop_strings_and_the_like_are_bounded() -> None:
    side = WorkerSide()
    for number, field in enumerate(("stop", "bad_words", "guided_choice")):
        items: Any = {field: tuple(f"s{n}" for n in range(limits.SAMPLING_ITEMS_MAX + 1))}
        sampling = SamplingParams(**items)
        assert side.dispatch(number, codec.encode(GenerateRequest(prompt="x", sampling=sampling))) == []
        assert f"{field} has 1025 items" in side.heard().outcomes[0].message
    assert side.dispatch(9, codec.encode(EmbedRequest(inputs=["x"], dimensions=2**40)), operation="embed") == []
    assert "dimensions is" in side.heard().outcomes[0].message


def test_a_welcome_that_nobody_asked_for_opens_no_session() -> None:
    side = WorkerSide()
    welcome = codec.pack(_welcome(1_000))
    side.session.disconnected()
    assert not side.session.receive(*welcome, 0)
    assert not side.session.registered
    side.session.connected(0)
    side.session.outbox.clear()
    # Of the former connection: this one has not said HELLO yet.
    assert not side.session.receive(*welcome, 0)
    assert not side.session.registered
    side.session.tick(10**9)
    assert isinstance(codec.unpack_control(side.session.outbox[-1][0]), WorkerHello)
    with pytest.raises(ProtocolError, match="beat_ms"):
        side.session.receive(*codec.pack(_welcome(0)), 0)
    assert side.session.receive(*welcome, 0)


def test_the_answer_to_a_hello_counts_whatever_was_heard_in_between() -> None:
    """A controller that has forgotten a worker answers each of its messages with UNKNOWN_SESSION, and its HELLO, which may be
    among them, with WELCOME."""
    unknown = codec.pack_unknown_session()
    for announces in (False, True):
        side = WorkerSide()
        name = side.begin(1)
        side.session.outbox.clear()
        if announces:
            side.session.announce([ModelInfo(name="other")], 0)
        side.session.receive(*unknown, 0)
        if not announces:
            side.session.tick(10**9)
            side.session.receive(*unknown, 10**9)
        assert not side.session.registered
        assert any(header[0] == kinds.WORKER_HELLO for header, _ in side.session.outbox)
        assert side.session.receive(*codec.pack(_welcome(1_000)), 10**9)
        assert side.session.registered
        told = [codec.unpack_control(header) for header, _ in side.session.outbox]
        carried = [
            line.request
            for message in told
            if isinstance(message, (WorkerHello, CarriedMore))
            for line in message.carried
        ]
        assert carried == [1]
        assert name in side.session.streams
        side.session.outbox.clear()
        side.session.tick(2 * 10**9)
        assert [header[0] for header, _ in side.session.outbox] == [kinds.LOAD]


def test_models_that_change_while_a_hello_is_on_its_way_are_announced_after_it() -> None:
    side = WorkerSide()
    side.session.disconnected()
    side.session.connected(0)
    side.session.tick(10**9)
    side.session.announce([ModelInfo(name="other")], 10**9)
    side.session.outbox.clear()
    side.session.receive(*codec.pack(_welcome(1_000)), 10**9)
    hellos = [codec.unpack_control(header) for header, _ in side.session.outbox if header[0] == kinds.WORKER_HELLO]
    assert [[info.name for info in hello.models] for hello in hellos] == [["other"]]


def test_faults_are_told_and_a_refusal_ends_the_session() -> None:
    side = WorkerSide()
    (order,) = side.session.receive(*codec.pack_fault(ProtocolError("no use")), 0)
    assert isinstance(order, Faulted)
    assert side.session.registered
    (order,) = side.session.receive(*codec.pack_refused(ProtocolError("too many bad frames")), 0)
    assert isinstance(order, Refused)
    assert not side.session.registered


def test_messages_of_a_session_mean_nothing_without_one() -> None:
    side = WorkerSide()
    name = side.begin(1)
    side.session.disconnected()
    assert side.abort(1) == side.grant(1, 0, 10, again=True, client=3) == side.dispatch(2) == []
    assert list(side.session.streams) == [name]
    assert side.session.streams[name].client is None


# ── from backends ───────────────────────────────────────────────────────────────────────────────────────────────────

SCORE = TokenLogprobs(token=Logprob(1, -0.5))
#: As a backend that no type checker has seen makes them.
delta: Any = Delta
usage_of: Any = Usage
logprob_of: Any = Logprob
token_of: Any = token
last_of: Any = last
UNSOUND: dict[str, Any] = {
    "half a character": token_of(text="\ud800"),
    "bytes": token_of(text=b"x"),
    "no text": token_of(text=None),
    "no token ids": delta(text="x", token_ids=None),
    "a fraction of a token": delta(text="x", token_ids=[1.5]),
    "text as tokens": delta(text="x", token_ids=["a"]),
    "no token among tokens": delta(text="x", token_ids=[1, None, 2]),
    "a token beyond 64 bits": delta(text="x", token_ids=[2**70]),
    "a negative choice": token_of(index=-1),
    "a choice too many": token_of(index=1),
    "no choice": token_of(index=None),
    "an end that is none": token_of(finish_reason="eos"),
    "usage that is none": last_of(usage={"prompt_tokens": 1}),
    "usage below nothing": last_of(usage=usage_of(-1, 1)),
    "log-probabilities of text": token_of(logprobs=["a"]),
    "log-probabilities that are none": token_of(logprobs=[None]),
    "log-probabilities of objects": token_of(logprobs=[object()]),
    "nothing": None,
    "a text": "delta",
    "a dictionary": {"text": "x"},
}


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("what", UNSOUND)
def test_a_delta_that_is_none_ends_its_own_stream(what: str, registered: bool) -> None:
    side = WorkerSide()
    good, bad, other = side.begin(1), side.begin(2), side.begin(3)
    side.emit((bad, token(text="fine ")))
    if not registered:
        side.session.disconnected()
    orders = side.emit((good, token(1)), (bad, UNSOUND[what]), (other, last(2)))
    if not registered:
        side.reconnect()
        for request in (1, 2, 3):
            orders += side.grant(request, 0, 1_024, again=True)
    assert [type(order) for order in orders] == [Spoiled, Stop]
    heard = side.heard()
    assert [(c.request, c.token_ids) for c in heard.chunks if c.request != 2] == [(1, [1]), (3, [2])]
    assert [(end.request, end.code) for end in heard.ends] == [(3, 0)]
    # The engine is told to stop, and the slot is free when it has.
    assert bad in side.session.stopping
    side.session.stopped(bad, 0)
    heard = side.heard()
    assert [(end.request, end.code) for end in heard.ends] == [(2, BackendError.code)]
    assert heard.outcomes[0].message
    side.emit((good, last()))
    assert [(end.request, end.code) for end in side.heard().ends] == [(1, 0)]
    assert not side.session.busy


def test_numbers_of_numpy_are_the_numbers_they_are() -> None:
    side = WorkerSide()
    names = [side.begin(number) for number in range(4)]
    side.emit((names[0], token()), (names[1], token()), (names[2], token()), (names[3], token()))
    side.heard()
    scores = [TokenLogprobs(token=logprob_of(np.int64(4), np.float32(-0.5)))]
    usage = usage_of(np.int32(3), np.int64(2))
    orders = side.emit(
        (names[0], delta(text="x", token_ids=[np.int64(4)])),
        (names[1], delta(text=np.str_("x"), token_ids=np.array([4, 5]), index=np.int64(0))),
        (names[2], Delta(text="x", token_ids=[4], logprobs=scores)),
        (names[3], last(4, usage=usage)),
    )
    assert orders == []
    heard = side.heard()
    assert [chunk.token_ids for chunk in heard.chunks] == [[4], [4, 5], [4], [4]]
    assert heard.chunks[2].extra is not None
    assert heard.chunks[2].extra.logprobs == [TokenLogprobs(token=Logprob(4, -0.5))]
    assert heard.outcomes[0].usage == Usage(3, 2)


def test_what_comes_after_the_end_of_a_choice_is_dropped() -> None:
    side = WorkerSide()
    name = side.begin(1, n=2)
    side.emit((name, last(1)), (name, token(2)), (name, last(3)), (name, token(4, index=1)))
    assert name in side.session.streams
    side.emit((name, last(5, index=1)), (name, token(6)))
    heard = side.heard()
    assert [(c.index, c.token_ids) for c in heard.chunks] == [(0, [1]), (1, [4]), (1, [5])]
    assert [end.code for end in heard.ends] == [0]


@pytest.mark.parametrize("result", [object(), {"a": object()}, "\ud800", {"x": 2**70}, {1j: 1}])
def test_a_result_that_cannot_be_sent_is_its_requests_error(result: object) -> None:
    side = WorkerSide()
    one, other = (side.begin(n, body=codec.encode(EmbedRequest(inputs=["x"])), operation="embed") for n in (1, 2))
    orders = side.session.succeed(one, result, 0)
    assert [type(order) for order in orders] == [Spoiled]
    assert not side.session.succeed(other, {"a": np.float32(0.5), "b": np.arange(3)}, 0)
    side.session.flush()
    heard = side.heard()
    assert [(end.request, end.code) for end in heard.ends] == [(1, BackendError.code), (2, 0)]
    assert codec.unpack_result(heard.outcomes[1].result, dict) == {"a": 0.5, "b": [0, 1, 2]}


def test_an_error_is_told_whatever_it_carries() -> None:
    side = WorkerSide()

    class OddError(FabricError):
        code = 10**9

        def __init__(self) -> None:
            Exception.__init__(self, "no message of its own")

    class MuteError(BackendError):
        def __str__(self) -> str:
            raise ValueError

    details: Any = {
        "numpy": np.int64(3), "half": "\udc00", "bytes": b"x", "list": [1], "huge": 2**70, "nan": float("nan"), 5: 6,
        "long": "x" * 10**6, "yes": True,
    }  # fmt: skip
    many: Any = {f"d{number}": number for number in range(10_000)}
    errors = [
        BackendError("half \ud800"),
        BackendError("x" * 10**7),
        BackendError("a"),
        BackendError("b"),
        OddError(),
        MuteError(""),
    ]
    errors[2].details, errors[3].details = details, many
    mute: Any = errors[5]
    mute.message = mute
    names = [side.begin(number) for number in range(len(errors))]
    for name, error in zip(names, errors, strict=True):
        side.session.fail(name, error, 0)
    side.session.flush()
    heard = side.heard()
    assert [end.code for end in heard.ends] == [BackendError.code] * len(errors)
    assert heard.outcomes[0].message == "half \\ud800"
    assert len(heard.outcomes[1].message) <= limits.MESSAGE_LENGTH_MAX
    told = heard.outcomes[2].details
    assert (told["numpy"], told["half"], told["5"], told["yes"]) == (3, "\\udc00", 6, True)
    assert len(str(told["long"])) <= limits.MESSAGE_LENGTH_MAX
    assert len(heard.outcomes[3].details) == limits.DETAILS_MAX
    assert heard.outcomes[4].message == "no message of its own"


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_terminals_of_one_turn_are_split_where_they_are_large() -> None:
    side = WorkerSide()
    body = codec.encode(EmbedRequest(inputs=["x"]))
    names = [side.begin(number, body=body, operation="embed") for number in range(20)]
    for name in names:
        side.session.succeed(name, bytes(3 * MIB), 0)
    side.session.flush()
    heard = side.heard()
    assert sorted(end.request for end in heard.ends) == list(range(20))
    assert all(end.code == 0 for end in heard.ends)
    assert all(len(part) <= limits.FRAME_BYTES_GOAL for frame in heard.frames for part in frame)


def test_one_result_that_no_receiver_takes_is_an_error_of_that_request_alone() -> None:
    side = WorkerSide(frame_bytes_max=MIB)
    body = codec.encode(EmbedRequest(inputs=["x"]))
    names = [side.begin(number, body=body, operation="embed") for number in range(3)]
    side.session.succeed(names[0], bytes(900_000), 0)
    side.session.succeed(names[1], bytes(MIB), 0)
    side.session.succeed(names[2], bytes(900_000), 0)
    (order,) = side.session.flush()
    assert order == Spoiled(names[1], order.error)  # type: ignore[union-attr]
    heard = side.heard()
    assert [(end.request, end.code) for end in heard.ends] == [(0, 0), (1, TooLargeError.code), (2, 0)]
    assert heard.outcomes[1].details["limit"] == MIB - 64
    assert not side.session.busy


def test_chunks_are_split_and_a_merged_one_is_taken_apart() -> None:
    side = WorkerSide(frame_bytes_max=MIB)
    first, second = side.begin(1, window=0), side.begin(2)
    # Without credit nothing leaves, and all of it is merged when it comes.
    for number in range(40):
        assert side.emit((first, token(number, text=f"{number:07}" * 20_000))) == []
    side.emit((second, token(1)))
    assert side.heard().chunks[0].request == 2
    assert side.grant(1, 0, 1_024) == []
    heard = side.heard()
    assert [t for chunk in heard.chunks for t in chunk.token_ids] == list(range(40))
    assert "".join(chunk.text for chunk in heard.chunks) == "".join(f"{number:07}" * 20_000 for number in range(40))
    assert [chunk.offset for chunk in heard.chunks] == sorted(chunk.offset for chunk in heard.chunks)
    side.emit((first, last(40)))
    (end,) = (heard := side.heard()).ends
    assert (end.code, heard.outcomes[0].units) == (0, 41)


def test_the_rest_that_a_terminal_brings_is_split_from_it() -> None:
    side = WorkerSide()
    name = side.begin(1, window=0)
    for number in range(9):
        side.emit((name, token(number, text="x" * MIB)))
    side.emit((name, last(9)))
    heard = side.heard()
    assert sum(len(chunk.text) for chunk in heard.chunks) == 9 * MIB + 2
    assert [end.code for end in heard.ends] == [0]
    assert all(len(part) <= limits.FRAME_BYTES_GOAL for frame in heard.frames for part in frame)


def test_a_single_unit_that_no_receiver_takes_ends_its_stream_alone() -> None:
    side = WorkerSide(frame_bytes_max=MIB)
    names = [side.begin(number) for number in range(3)]
    orders = side.emit((names[0], token(1)), (names[1], token(1, text="x" * MIB)), (names[2], last(1, text="y" * MIB)))
    # Of the third the engine has ended by itself.
    assert [order for order in orders if isinstance(order, Stop)] == [Stop(names[1])]
    side.session.stopped(names[1], 0)
    heard = side.heard()
    assert {(end.request, end.code) for end in heard.ends} == {(1, TooLargeError.code), (2, TooLargeError.code)}
    assert [chunk.request for chunk in heard.chunks] == [0]


def test_a_large_delta_of_many_tokens_is_split_at_its_tokens() -> None:
    side = WorkerSide(frame_bytes_max=MIB)
    name = side.begin(1)
    scores = [TokenLogprobs(token=Logprob(n, -0.5), top=[Logprob(k, -1.0) for k in range(20)]) for n in range(16_000)]
    assert side.emit((name, Delta(text="all", token_ids=list(range(16_000)), logprobs=scores))) == []
    side.grant(1, 0, 16_000)
    heard = side.heard()
    assert [t for chunk in heard.chunks for t in chunk.token_ids] == list(range(16_000))
    assert "".join(chunk.text for chunk in heard.chunks) == "all"
    assert [s for chunk in heard.chunks for s in (chunk.extra and chunk.extra.logprobs) or ()] == scores


def test_a_hello_holds_what_fits_and_the_rest_follows_after_the_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONTROL_BODY_BYTES_MAX", 8_192)
    monkeypatch.setattr(limits, "FRAME_BYTES_GOAL", 4_096)
    side = WorkerSide()
    names = [side.begin(number, lock=b"l" * 16) for number in range(1_000)]
    side.emit((names[5], last()))
    side.session.disconnected()
    side.session.connected(0)
    side.session.outbox.clear()
    side.session.tick(10**9)
    ((header, _),) = side.session.outbox
    assert len(header) <= 8_192
    told = codec.unpack_control(header).carried
    # One that ends between the two is carried once as well.
    side.emit((names[6], last()))
    side.session.outbox.clear()
    side.session.receive(*codec.pack(_welcome(1_000)), 0)
    # The HELLO offered no slots: what it did not tell may hold them. The report after the rest does.
    *rest, (report, _) = side.session.outbox
    assert codec.unpack_control(header).load.slots == 0
    assert codec.unpack_control(report) == side.session.load
    for header, _ in rest:
        more = codec.unpack_control(header)
        assert isinstance(more, CarriedMore)
        assert len(header) <= 4_096
        told += more.carried
    assert sorted(line.request for line in told) == list(range(1_000))
    assert all(line.lock == b"l" * 16 for line in told)
    assert next(line for line in told if line.request == 5).finished


@pytest.mark.parametrize(
    "models",
    [
        [ModelInfo(name=f"m{n}", details={"x": "y" * 50_000}) for n in range(100)],
        [ModelInfo(name=f"m{n}") for n in range(limits.WORKER_MODELS_MAX + 1)],
        [ModelInfo(name="m" * 300)],
        [ModelInfo(name="")],
        [ModelInfo(name="\ud800")],
        [ModelInfo(name="m", details={"x": [1]})],  # type: ignore[dict-item]
        [ModelInfo(name="m", slots=-1)],
        [object()],
    ],
)
def test_models_that_cannot_be_announced_are_refused_and_change_nothing(models: Any) -> None:
    side = WorkerSide()
    with pytest.raises(ConfigurationError, match="cannot be announced"):
        side.session.announce(models, 0)
    assert side.session.outbox == []
    assert side.session.models == [ModelInfo(name="m")]


def test_a_worker_says_that_it_serves_nothing_and_takes_numbers_for_what_they_are() -> None:
    side = WorkerSide()
    model: Any = ModelInfo
    side.session.announce([], 0)
    side.session.announce([model(name="n", context_length=np.int64(5))], 0)
    first, second = (codec.unpack_control(header) for header, _ in side.session.outbox)
    assert (first.models, second.models) == ([], [ModelInfo(name="n", context_length=5)])


def test_a_reader_whose_answer_is_gone_does_not_wait_for_it() -> None:
    side = WorkerSide()
    assert side.grant(77, 0, 10) == []
    assert side.heard().ends == []
    assert side.grant(77, 3, 10, again=True) == []
    assert [(end.request, end.code) for end in side.heard().ends] == [(77, WorkerLostError.code)]


def _welcome(beat_ms: int) -> Welcome:
    return Welcome(
        version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=1, token=b"t", beat_ms=beat_ms, lease_ms=3_000,
        frame_bytes_max=limits.FRAME_BYTES_MAX,
    )  # fmt: skip


def test_a_second_word_of_an_unknown_session_does_not_take_back_the_hello() -> None:
    """Two messages of the former session were on their way: the WELCOME to the HELLO between their answers counts."""
    side = WorkerSide()
    side.session.receive(*codec.pack_unknown_session(), 0)
    side.session.tick(10**9)
    assert isinstance(codec.unpack_control(side.session.outbox[-1][0]), WorkerHello)
    side.session.receive(*codec.pack_unknown_session(), 10**9)
    side.session.receive(*codec.pack(_welcome(1_000)), 10**9)
    assert side.session.registered


def test_an_announcement_carries_what_runs_in_case_its_session_is_over() -> None:
    """The controller may have ended the session, and not have been heard: then the announcement begins the next one."""
    side = WorkerSide()
    side.begin(1)
    side.session.outbox.clear()
    side.session.announce([ModelInfo(name="other", capabilities=["generate"])], 0)
    ((header, _),) = side.session.outbox
    (line,) = codec.unpack_control(header).carried
    assert (line.request, line.finished) == (1, False)
