"""The client's session as the pure machine that it is: what the controller says goes in, frames come out."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest
from msgspec import Raw

from zfabric import limits
from zfabric.core.client.pending import Pending, Resume
from zfabric.core.client.session import ClientSession
from zfabric.errors import (
    BackendError,
    ClosedError,
    ConnectionLostError,
    DeadlineExceededError,
    FabricError,
    NameTakenError,
    ProtocolError,
    QuotaExceededError,
    RequestCancelledError,
    TooLargeError,
    UnsupportedParameterError,
    VersionMismatchError,
    WorkerLostError,
)
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.messages import Beat, End, Ends, Goodbye, Welcome
from zfabric.wire.payloads import GenerateRequest, OperateRequest, TextRequest
from zfabric.wire.questions import Answer
from zfabric.wire.sampling import SamplingOptions, SamplingParams
from zfabric.wire.tasks import EmbedRequest

MILLISECOND = 1_000_000
GREEDY = SamplingParams(temperature=0)


class Reader:
    """A sink that notes what comes."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.ends: list[FabricError | None] = []
        self.outcome: Outcome | None = None

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        if text == "burn":
            raise ValueError("this sink burns")
        self.chunks.append(Chunk(0, 0, index, 0, text, token_ids, extra))

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        self.ends.append(error)
        self.outcome = outcome

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def error(self) -> FabricError | None:
        (error,) = self.ends
        return error


class Asker:
    """An inquirer that notes what comes."""

    def __init__(self) -> None:
        self.answers: list[tuple[FabricError | None, list[Any]]] = []

    def answered(self, error: FabricError | None, results: list[Raw]) -> None:
        self.answers.append((error, [msgpack.unpackb(bytes(result)) for result in results]))


class Wire:
    """A session, the controller's words to it, and what it says."""

    def __init__(self, **options: Any) -> None:
        self.faults: list[FabricError] = []
        self.session = ClientSession(
            instance=7, rng=random.Random(1), secret=b"s" * 16, on_fault=self.faults.append, **options
        )
        self.now_ns = 10**12

    def submit(self, request: Any = None, operation: Any = "generate", **options: Any) -> tuple[Pending, Reader]:
        reader = Reader()
        options.setdefault("model", "m")
        request = request or GenerateRequest(prompt="p", sampling=GREEDY)
        return self.session.submit(operation, request, reader, self.now_ns, **options), reader

    def up(self, **welcome: Any) -> None:
        """Connect and be welcomed."""
        self.session.connected(self.now_ns)
        self.tick(limits.HELLO_JITTER_MS)
        self.welcome(**welcome)

    def welcome(self, **given: Any) -> None:
        form: dict[str, Any] = {
            "version": 1, "build": "", "epoch": 1, "session": 3, "token": b"t", "beat_ms": 1_000, "lease_ms": 3_000,
            "frame_bytes_max": limits.FRAME_BYTES_MAX,
        }  # fmt: skip
        self.hear(codec.pack(Welcome(**form | given)))

    def hear(self, frames: codec.Frames) -> None:
        self.session.receive(*frames, self.now_ns)

    def tick(self, milliseconds: float) -> None:
        self.now_ns += int(milliseconds * MILLISECOND)
        self.session.tick(self.now_ns)

    def said(self) -> list[Any]:
        """What was said since, decoded; a SUBMIT with its request."""
        self.session.flush()
        outbox, self.session.outbox = self.session.outbox, []
        words: list[Any] = []
        for header, body in outbox:
            if header[0] == kinds.SUBMIT:
                envelope = codec.unpack_envelope(header)
                words.append((envelope, codec.unpack_request(envelope.operation, body)))
            else:
                words.append(codec.unpack_control(header))
        return words

    def said_of(self, kind: str) -> list[Any]:
        """The same of one kind alone."""
        found = [word for word in self.said() if type(word[0] if isinstance(word, tuple) else word).__name__ == kind]
        assert found, f"no {kind} was said"
        return found

    def chunk(self, pending: Pending, text: str, tokens: list[int], **extra: Any) -> None:
        chunk = Chunk(pending.number, pending.attempt, 0, pending.next, text, tokens)
        chunk.extra = ChunkExtra(**extra) if extra else None
        self.hear(codec.pack_chunks(3, [chunk]))

    def end(self, pending: Pending, error: FabricError | None = None, **outcome: Any) -> None:
        code = error.code if error else 0
        form = {"units": pending.next} | ({"message": error.message, "details": error.details} if error else {})
        self.ends([End(request=pending.number, attempt=pending.attempt, code=code)], [Outcome(**form | outcome)])

    def ends(self, ends: list[End], outcomes: Any, chunks: Any = ()) -> None:
        header = codec.pack_envelope(Ends(instance=7, ends=ends))
        self.hear((header, codec.encode([chunks, outcomes])))


def lost(**details: Any) -> WorkerLostError:
    return WorkerLostError("worker 'w' was lost", worker="w", **details)


# ── what goes out ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_encoded_is_refused_before_it_is_accepted() -> None:
    """Also before there is a session, where it once took all other requests along."""
    wire = Wire()
    _, neighbour = wire.submit()
    for request, name in (
        (GenerateRequest(prompt="half \ud800"), "prompt"),
        (GenerateRequest(prompt="p", sampling=SamplingParams(logit_bias={2**70: 1.0})), "logit_bias"),
        (GenerateRequest(messages=[{"role": object()}]), "messages"),
    ):
        with pytest.raises(FabricError, match=name) as caught:
            wire.submit(request)
        assert caught.value.details["parameter"] == name
    with pytest.raises(FabricError, match="arguments"):
        wire.submit(OperateRequest(call="c", arguments={"x": object()}), "operate", worker="w")
    with pytest.raises(FabricError, match="arguments"):
        wire.session.ask("model", {"name": object()}, Asker(), wire.now_ns)
    assert len(wire.session.requests) == 1
    assert len(wire.session.timers) == 0
    wire.up()
    assert len(wire.said_of("Submit")) == 1
    assert neighbour.ends == []


def test_what_is_too_large_is_refused_with_the_name_of_what_makes_it_so() -> None:
    wire = Wire()
    with pytest.raises(TooLargeError, match="most of them in inputs") as caught:
        wire.submit(EmbedRequest(inputs=["x" * limits.FRAME_BYTES_MAX]), "embed")
    assert caught.value.details["parameter"] == "inputs"
    with pytest.raises(TooLargeError, match="limit is"):
        wire.session.ask("model", {"name": "x" * limits.CONTROL_BODY_BYTES_MAX}, Asker(), wire.now_ns)
    # Within a frame, and more than a worker would decode: neither side waits for the other to say so.
    with pytest.raises(TooLargeError, match="limit is"):
        wire.submit(GenerateRequest(prompt_token_ids=[1] * (limits.REQUEST_VALUES_MAX + 1)))
    with pytest.raises(TooLargeError, match="limit is"):
        wire.submit(GenerateRequest(prompt="x" * (limits.REQUEST_TEXT_BYTES_MAX + 1)))
    assert not wire.session.busy
    _, early = wire.submit(GenerateRequest(prompt="x" * 2_000))
    wire.up(frame_bytes_max=1_000)
    assert isinstance(early.error, TooLargeError)
    with pytest.raises(TooLargeError):
        wire.submit(GenerateRequest(prompt="x" * 2_000))


def test_a_later_attempt_is_the_first_ones_bytes_with_what_arrived() -> None:
    wire = Wire()
    wire.up()
    pending, _ = wire.submit(GenerateRequest(messages=[{"role": "user", "content": "é"}], sampling=GREEDY, tools=[{}]))
    ((_, first),) = wire.said_of("Submit")
    wire.chunk(pending, "añb", [5, 6])
    wire.end(pending, lost())
    ((envelope, again),) = wire.said_of("Submit")
    assert (envelope.attempt, envelope.resume_from) == (1, 2)
    assert (again.resume_token_ids, again.resume_characters) == ([5, 6], 3)
    again.resume_token_ids, again.resume_characters = [], 0
    assert again == first


def test_an_operators_call_is_not_kept_once_it_is_sent() -> None:
    wire = Wire()
    pending, reader = wire.submit(OperateRequest(call="c"), "operate", model="", worker="w")
    assert pending.body
    wire.up()
    assert pending.body == b""
    wire.end(pending, lost())
    assert isinstance(reader.error, WorkerLostError)


def test_cancelled_in_the_same_turn_the_fabric_hears_of_both_in_order() -> None:
    wire = Wire()
    wire.up()
    wire.said()
    pending, reader = wire.submit()
    wire.session.cancel(pending)
    submit, cancel = wire.said()
    assert submit[0].request == pending.number
    assert cancel.requests == [pending.number]
    assert isinstance(reader.error, RequestCancelledError)
    assert not wire.session.busy
    other = Wire()
    unsent, _ = other.submit()
    other.session.cancel(unsent)
    other.up()
    assert [type(word).__name__ for word in other.said()] == ["ClientHello"]


def test_a_gap_cancels_before_the_next_attempt_leaves() -> None:
    wire = Wire()
    wire.up()
    pending, _ = wire.submit()
    wire.said()
    wire.hear(codec.pack_chunks(3, [Chunk(pending.number, 0, 0, 5, "late", [1])]))
    cancel, (submit, _) = wire.said()
    assert cancel.requests == [pending.number]
    assert (submit.request, submit.attempt) == (pending.number, 1)


def test_lists_beyond_their_limits_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIST_LENGTH_MAX", 4)
    wire = Wire()
    wire.up()
    pendings = [wire.submit(window=2)[0] for _ in range(10)]
    wire.said()
    for pending in pendings:
        wire.session.consumed([(pending, 2)])
    assert [len(word.lines) for word in wire.said_of("Credit")] == [4, 4, 2]
    for pending in pendings:
        wire.session.cancel(pending)
    assert [len(word.requests) for word in wire.said_of("Cancel")] == [4, 4, 2]


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hello_stays_within_its_bounds_however_much_it_claims() -> None:
    """Long names make 4 MiB with a few thousand claims; the rest follows the WELCOME."""
    wire = Wire(label="é" * limits.NAME_LENGTH_MAX)
    wire.up()
    count = 6_000
    pendings = {wire.submit(model="名" * limits.NAME_LENGTH_MAX)[0].number for _ in range(count)}
    wire.session.disconnected()
    wire.session.outbox.clear()
    wire.session.connected(wire.now_ns)
    wire.tick(limits.HELLO_JITTER_MS)
    assert all(len(header) <= limits.CONTROL_BODY_BYTES_MAX for header, _ in wire.session.outbox)
    (hello,) = wire.said()
    assert hello.secret == b"s" * 16
    wire.welcome()
    assert all(len(header) <= limits.CONTROL_BODY_BYTES_MAX for header, _ in wire.session.outbox)
    rest = wire.said_of("Claims")
    claimed = [claim.request for word in (hello, *rest) for claim in word.claims]
    assert len(claimed) == count
    assert set(claimed) == pendings
    assert len(rest) > 0


def test_a_hello_said_again_claims_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that ends meanwhile must not move another one's claim past the WELCOME."""
    monkeypatch.setattr(limits, "LIST_LENGTH_MAX", 2)
    wire = Wire()
    wire.up()
    first, second, third, fourth = (wire.submit()[0] for _ in range(4))
    wire.session.disconnected()
    wire.session.outbox.clear()
    wire.session.connected(wire.now_ns)
    wire.tick(limits.HELLO_JITTER_MS)
    wire.session.cancel(first)
    wire.tick(2 * limits.HELLO_RETRY_MS)
    one, two = wire.said_of("ClientHello")
    assert [claim.request for claim in one.claims] == [first.number, second.number]
    assert [claim.request for claim in two.claims] == [second.number]
    wire.welcome()
    (more,) = wire.said_of("Claims")
    assert [claim.request for claim in more.claims] == [third.number, fourth.number]


@pytest.mark.parametrize("resume", ["never", "exact"])
def test_what_cannot_go_on_elsewhere_waits_for_its_worker(resume: Resume) -> None:
    """The terminal says for how long it may come back; the word after that is final."""
    wire = Wire()
    wire.up()
    sampling = GREEDY if resume == "never" else SamplingParams()
    pending, reader = wire.submit(GenerateRequest(prompt="p", sampling=sampling), resume=resume)
    wire.chunk(pending, "a", [1])
    wire.said()
    wire.end(pending, lost(claim_ms=1_500))
    (claims,) = wire.said_of("Claims")
    (claim,) = claims.claims
    assert (claim.request, claim.attempt, claim.next, claim.window) == (pending.number, 0, 1, limits.WINDOW_UNITS)
    assert reader.ends == []
    wire.chunk(pending, "b", [2])
    wire.end(pending)
    assert (reader.text, reader.error) == ("ab", None)

    pending, reader = wire.submit(GenerateRequest(prompt="p", sampling=sampling), resume=resume)
    wire.chunk(pending, "a", [1])
    wire.end(pending, lost(claim_ms=1_500))
    wire.end(pending, lost())
    assert isinstance(reader.error, WorkerLostError)
    assert "claim_ms" not in reader.error.details


def test_what_can_go_on_elsewhere_does_so_at_once() -> None:
    wire = Wire()
    wire.up()
    pending, _ = wire.submit()
    wire.chunk(pending, "a", [1])
    wire.said()
    wire.end(pending, lost(claim_ms=1_500))
    (word,) = wire.said()
    assert word[0].attempt == 1


def test_what_nobody_else_can_go_on_with_waits_for_its_worker_after_all() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    wire.chunk(pending, "a", [1])
    wire.end(pending, lost(claim_ms=1_500))
    wire.said()
    wire.end(pending, WorkerLostError("nobody goes on", resumable=False))
    (claims,) = wire.said_of("Claims")
    assert [(claim.request, claim.attempt, claim.next) for claim in claims.claims] == [(pending.number, 0, 1)]
    wire.chunk(pending, "b", [2])
    wire.end(pending)
    assert (reader.text, reader.error) == ("ab", None)

    pending, reader = wire.submit()
    wire.chunk(pending, "a", [1])
    wire.end(pending, lost(claim_ms=1_500))
    wire.end(pending, WorkerLostError("nobody goes on", resumable=False))
    wire.end(pending, lost())
    wire.end(pending, WorkerLostError("nobody goes on", resumable=False))
    assert isinstance(reader.error, WorkerLostError)
    assert reader.error.details["resumable"] is False


def test_an_operators_call_waits_for_its_worker_too() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit(OperateRequest(call="c"), "operate", model="", worker="w")
    wire.said()
    wire.end(pending, lost(claim_ms=1_500))
    assert wire.said_of("Claims")[0].claims[0].request == pending.number
    wire.end(pending)
    assert reader.error is None


def test_a_claim_whose_connection_goes_is_in_the_next_hello() -> None:
    wire = Wire()
    wire.up()
    pending, _ = wire.submit(resume="never")
    wire.chunk(pending, "a", [1])
    wire.end(pending, lost(claim_ms=1_500))
    wire.session.disconnected()
    wire.session.outbox.clear()
    wire.session.connected(wire.now_ns)
    wire.tick(limits.HELLO_JITTER_MS)
    (hello,) = wire.said()
    assert [claim.request for claim in hello.claims] == [pending.number]


def test_a_loss_that_never_ends_is_final_some_time() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit(resume="never")
    wire.chunk(pending, "a", [1])
    for _ in range(limits.ATTEMPTS_MAX + 1):
        wire.end(pending, lost(claim_ms=1_500))
    assert isinstance(reader.error, WorkerLostError)


@pytest.mark.parametrize("resume", ["never", "exact"])
def test_what_is_not_found_after_its_deadline_has_missed_it(resume: Resume) -> None:
    """The controller ended it while this client was away, and could not say so."""
    wire = Wire()
    wire.up()
    pending, reader = wire.submit(GenerateRequest(prompt="p", sampling=GREEDY), resume=resume, deadline_ms=100)
    wire.chunk(pending, "a", [1])
    wire.session.disconnected()
    wire.tick(100)
    wire.up()
    wire.end(pending, ConnectionLostError("no worker has it", resumable=False))
    assert isinstance(reader.error, DeadlineExceededError)
    assert "no worker has it" in reader.error.message


# ── drawn seeds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(wire: Wire, **options: Any) -> tuple[Pending, Reader, int]:
    """An answer by default arguments, of which a token has arrived from a worker that took the drawn seed."""
    wire.up()
    pending, reader = wire.submit(TextRequest(prompt="p"), **options)
    ((_, request),) = wire.said_of("Submit")
    assert request.sampling.seed is None
    assert 0 <= request.drawn_seed < 2**63
    wire.chunk(pending, "a", [1], worker="w", exact=True)
    return pending, reader, request.drawn_seed


def test_with_default_arguments_an_answer_goes_on_by_the_seed_that_was_drawn() -> None:
    wire = Wire()
    pending, _, seed = drawn(wire)
    wire.end(pending, lost(claim_ms=1_500))
    ((envelope, request),) = wire.said_of("Submit")
    assert (envelope.attempt, envelope.resume_from, request.sampling.seed) == (1, 1, seed)
    assert request.sampling == SamplingOptions(seed=seed)


def test_a_worker_that_does_not_draw_by_seeds_ends_it_with_the_loss_that_was() -> None:
    wire = Wire()
    pending, reader, _ = drawn(wire)
    wire.end(pending, lost(claim_ms=1_500))
    wire.end(pending, UnsupportedParameterError("parameter 'seed' is not supported by x", parameter="seed"))
    assert isinstance(reader.error, WorkerLostError)
    wire = Wire()
    pending, reader, _ = drawn(wire, resume="any")
    wire.end(pending, lost())
    wire.end(pending, UnsupportedParameterError("parameter 'seed' is not supported by x", parameter="seed"))
    ((envelope, request),) = wire.said_of("Submit")[-1:]
    assert (envelope.attempt, request.sampling.seed) == (2, None)


@pytest.mark.parametrize("several", [{"n": 2}, {"best_of": 2}, {"use_beam_search": True, "best_of": 2}])
def test_an_answer_of_several_choices_goes_on_nowhere_else(several: dict[str, Any]) -> None:
    """The tokens of its choices stand among each other, so they are no text that a worker could go on from."""
    wire = Wire()
    wire.up()
    pending, reader = wire.submit(GenerateRequest(prompt="p", sampling=SamplingParams(**several)), resume="any")
    wire.chunk(pending, "a", [1], worker="w")
    wire.said()
    wire.end(pending, lost())
    assert wire.said() == []
    assert isinstance(reader.error, WorkerLostError)


def test_a_seed_of_the_callers_own_is_never_replaced() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit(GenerateRequest(prompt="p", sampling=SamplingParams(seed=5)))
    ((_, request),) = wire.said_of("Submit")
    assert (request.sampling.seed, request.drawn_seed) == (5, None)
    wire.chunk(pending, "a", [1], worker="w", exact=True)
    wire.end(pending, lost())
    assert wire.said_of("Submit")[0][1].sampling.seed == 5
    wire.end(pending, UnsupportedParameterError("parameter 'seed' is not supported by x", parameter="seed"))
    assert isinstance(reader.error, UnsupportedParameterError)


def test_a_greedy_answer_goes_on_without_a_seed() -> None:
    wire = Wire()
    wire.up()
    greedy = SamplingOptions(temperature=0)
    pending, _ = wire.submit(TextRequest(prompt="p", sampling=greedy))
    wire.said()
    wire.chunk(pending, "a", [1], worker="w", exact=True)
    wire.end(pending, lost())
    assert wire.said_of("Submit")[0][1].sampling == greedy


def test_what_no_worker_called_exact_ends() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit(GenerateRequest(prompt="p"))
    wire.chunk(pending, "a", [1], worker="w")
    wire.end(pending, lost())
    assert isinstance(reader.error, WorkerLostError)


# ── faults and refusals ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fault_ends_what_it_names() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    _, neighbour = wire.submit()
    asker, other = Asker(), Asker()
    inquiry = wire.session.ask("models", {}, asker, wire.now_ns)
    wire.session.ask("models", {}, other, wire.now_ns)
    error = ProtocolError("no use")
    wire.hear(codec.pack_fault(error, codec.Subject(request=pending.number, attempt=0)))
    wire.hear(codec.pack_fault(error, codec.Subject(query=inquiry.number)))
    assert isinstance(reader.error, ProtocolError)
    assert isinstance(asker.answers[0][0], ProtocolError)
    assert neighbour.ends == [] == other.answers
    assert wire.faults == []


def test_a_fault_of_nothing_that_waits_is_counted_and_told() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    for subject in (
        codec.NO_SUBJECT,
        codec.Subject(query=99),
        codec.Subject(request=pending.number + 1, attempt=0),
        codec.Subject(request=pending.number, attempt=4),
    ):
        wire.hear(codec.pack_fault(ProtocolError("no use"), subject))
    assert wire.session.counters.faults == len(wire.faults) == 4
    assert reader.ends == []


def test_a_fault_after_which_another_attempt_is_due_leads_to_one() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    wire.hear(codec.pack_fault(lost(), codec.Subject(request=pending.number, attempt=0)))
    assert [word[0].attempt for word in wire.said_of("Submit")] == [0, 1]
    assert reader.ends == []


def test_a_refusal_on_a_standing_session_ends_it_and_hello_is_tried_again() -> None:
    """So that a client which the controller ignores does not wait in silence."""
    wire = Wire()
    wire.up()
    wire.said()
    wire.hear(codec.pack_refused(QuotaExceededError("too many")))
    assert not wire.session.ready
    assert isinstance(wire.session.refused, QuotaExceededError)
    wire.tick(limits.HELLO_RETRY_MS)
    wire.said_of("ClientHello")
    wire.welcome()
    assert wire.session.refused is None
    assert wire.session.ready


def test_who_speaks_under_a_clients_number_does_not_keep_it_out() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    wire.session.disconnected()
    wire.session.connected(wire.now_ns)
    wire.tick(limits.HELLO_JITTER_MS)
    wire.said()
    wire.hear(codec.pack_refused(NameTakenError("another client has this instance number")))
    wire.tick(1.25 * limits.HELLO_RETRY_MS)
    (hello,) = wire.said_of("ClientHello")
    assert hello.instance == wire.session.instance != 7
    # Whoever waits in vain now was not refused.
    assert wire.session.refused is None
    assert [claim.request for claim in hello.claims] == [pending.number]
    wire.welcome()
    wire.end(pending, ConnectionLostError("no worker has it"))
    assert reader.ends == []
    assert wire.said_of("Submit")[0][0].attempt == 1


def test_a_refusal_is_tried_again_and_forgotten_with_its_connection() -> None:
    wire = Wire()
    wire.session.connected(wire.now_ns)
    wire.hear(codec.pack_refused(VersionMismatchError("other")))
    wire.said()
    for _ in range(3):
        wire.tick(1.25 * limits.HELLO_RETRY_MS)
        wire.said_of("ClientHello")
    wire.session.disconnected()
    assert wire.session.refused is not None
    wire.session.connected(wire.now_ns)
    assert wire.session.refused is None


def test_sessions_that_come_and_go_leave_one_beat() -> None:
    wire = Wire()
    wire.up()
    for _ in range(5):
        wire.hear(codec.pack_unknown_session())
        wire.tick(limits.HELLO_JITTER_MS)
        wire.welcome()
    wire.said()
    wire.tick(1_000)
    assert sum(isinstance(word, Beat) for word in wire.said()) == 1


@pytest.mark.parametrize("beat_ms", [0, -5, 2**62])
def test_no_beat_that_a_controller_asks_for_stops_the_client(beat_ms: int) -> None:
    wire = Wire()
    wire.up(beat_ms=beat_ms)
    wire.said()
    wire.tick(1_000)
    assert sum(isinstance(word, Beat) for word in wire.said()) <= 1_000 / limits.BEAT_MS_MIN


def test_words_of_a_former_connection_open_no_session() -> None:
    wire = Wire()
    wire.up()
    wire.session.disconnected()
    wire.welcome()
    assert not wire.session.ready


# ── what cannot be read ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chunk_that_does_not_decode_ends_its_stream_alone() -> None:
    for wrong in (
        {"texts": [5, "a"]},
        {"tokens": [["x"], [1]]},
        {"tokens": [None, 1]},
        {"offsets": ["0", 0]},
        {"indexes": [[], 0]},
        {"extras": [[0, ["many"]]]},
    ):
        wire = Wire()
        wire.up()
        bad, bad_reader = wire.submit()
        good, good_reader = wire.submit()
        wire.hear((codec.chunks_route(3) + columns([bad.number, good.number], **wrong), b""))
        assert isinstance(bad_reader.error, ProtocolError)
        assert (good_reader.text, good_reader.ends) == ("a", [])
        assert wire.said_of("Cancel")[0].requests == [bad.number]


@pytest.mark.parametrize(
    "wrong",
    [
        {"texts": ["a"]},
        {"offsets": []},
        {"attempts": [0]},
        {"extras": [[2, []]]},
        {"extras": [[-1, []]]},
        {"extras": [[0]]},
        {"requests": 5},
    ],
)
def test_columns_that_do_not_belong_together_are_nobodys(wrong: dict[str, Any]) -> None:
    """Nobody can say whose entries these are. The next chunk shows that they are missing, and their streams go on elsewhere."""
    wire = Wire()
    wire.up()
    one, reader = wire.submit()
    other, _ = wire.submit()
    with pytest.raises(ProtocolError):
        wire.hear((codec.chunks_route(3) + columns([one.number, other.number], **wrong), b""))
    assert (reader.text, reader.ends) == ("", [])
    wire.hear(codec.pack_chunks(3, [Chunk(one.number, 0, 0, 1, "b", [2])]))
    assert wire.session.counters.gaps == 1


def columns(numbers: list[int], **wrong: Any) -> bytes:
    """Chunks of these requests, one token each, with other values for some columns."""
    many = len(numbers)
    known = {
        "requests": numbers, "offsets": [0] * many, "texts": ["a"] * many, "tokens": [1] * many, "attempts": [], "indexes": [],
        "extras": [],
    }  # fmt: skip
    return bytes(msgpack.packb(list({**known, **wrong}.values())))


def test_an_outcome_that_does_not_decode_ends_its_request_alone() -> None:
    wire = Wire()
    wire.up()
    bad, bad_reader = wire.submit()
    good, good_reader = wire.submit()
    ends = [End(request=pending.number, attempt=0, code=0) for pending in (bad, good)]
    wire.ends(ends, [[0, None, "", {"a": [1]}], [1]], Raw(columns([good.number])))
    assert isinstance(bad_reader.error, ProtocolError)
    assert (good_reader.text, good_reader.error) == ("a", None)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x91\x90", msgpack.packb([[], []]), msgpack.packb([5, 5])])
def test_a_terminal_whose_body_is_no_use_still_is_one(body: bytes) -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    header = codec.pack_envelope(Ends(instance=7, ends=[End(request=pending.number, attempt=0)]))
    wire.hear((header, body))
    assert isinstance(reader.error, ProtocolError)
    assert not wire.session.busy


@pytest.mark.parametrize("units", [0, -1, 2**32, 2**63])
def test_a_chunk_of_impossible_length_ends_its_stream(units: int) -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    wire.chunk(pending, "a", [1], units=units)
    assert isinstance(reader.error, ProtocolError)
    wire.session.consumed([(pending, 2**62)])
    wire.said()


def test_a_sink_that_raises_ends_its_own_request() -> None:
    wire = Wire()
    wire.up()
    bad, bad_reader = wire.submit()
    good, good_reader = wire.submit()
    chunks = [Chunk(bad.number, 0, 0, 0, "burn", [1]), Chunk(good.number, 0, 0, 0, "a", [1])]
    wire.hear(codec.pack_chunks(3, chunks))
    assert isinstance(bad_reader.error, ProtocolError)
    assert "burns" in bad_reader.error.message
    assert (good_reader.text, good_reader.ends) == ("a", [])


def test_details_of_any_name_reach_the_reader() -> None:
    wire = Wire()
    wire.up()
    pending, reader = wire.submit()
    error = BackendError("broke")
    error.details = {"message": "x", "self": 1, "error": None}
    wire.end(pending, error)
    assert isinstance(reader.error, BackendError)
    assert reader.error.details == error.details


# ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(number: int, result: Any, **more: Any) -> codec.Frames:
    return codec.pack(Answer(number=number, code=0, result=codec.raw(result), **more))


def test_an_answer_in_parts_is_one() -> None:
    wire = Wire()
    wire.up()
    asker = Asker()
    inquiry = wire.session.ask("models", {}, asker, wire.now_ns)
    wire.hear(answer(inquiry.number, [1, 2], more=True))
    assert asker.answers == []
    wire.hear(answer(inquiry.number, [3]))
    assert asker.answers == [(None, [[1, 2], [3]])]
    assert not wire.session.busy
    assert len(wire.session.timers) == 1, "only the beat"


def test_parts_of_a_former_session_are_not_mixed_in() -> None:
    wire = Wire()
    wire.up()
    asker = Asker()
    inquiry = wire.session.ask("models", {}, asker, wire.now_ns)
    before = inquiry.number
    wire.hear(answer(before, [1], more=True))
    wire.session.disconnected()
    wire.up()
    wire.hear(answer(before, [2]))
    assert asker.answers == []
    wire.hear(answer(wire.said_of("Query")[-1].number, [3]))
    assert asker.answers == [(None, [[3]])]


def test_no_question_waits_for_ever() -> None:
    wire = Wire()
    early, late = Asker(), Asker()
    wire.session.ask("models", {}, early, wire.now_ns)
    wire.tick(limits.QUERY_TIMEOUT_MS)
    assert isinstance(early.answers[0][0], ConnectionLostError)
    wire.up()
    wire.session.ask("status", {}, late, wire.now_ns, 5)
    wire.tick(5)
    assert isinstance(late.answers[0][0], DeadlineExceededError)
    assert "status" in str(late.answers[0][0])
    assert not wire.session.busy


def test_all_that_waits_ends_once_when_the_client_is_closed() -> None:
    wire = Wire()
    wire.up()
    _, reader = wire.submit()
    asker = Asker()
    wire.session.ask("models", {}, asker, wire.now_ns)
    wire.said()
    wire.session.close()
    assert isinstance(reader.error, ClosedError)
    assert isinstance(asker.answers[0][0], ClosedError)
    assert wire.said() == [Goodbye()]
    with pytest.raises(ClosedError):
        wire.submit()
    with pytest.raises(ClosedError):
        wire.session.ask("models", {}, asker, wire.now_ns)


def test_only_what_has_waited_for_so_long_is_given_up() -> None:
    wire = Wire()
    _, old = wire.submit()
    wire.tick(5)
    _, new = wire.submit()
    wire.session.abandon(ConnectionLostError("nobody"), wire.now_ns - 5 * MILLISECOND)
    assert isinstance(old.error, ConnectionLostError)
    assert new.ends == []
    assert wire.session.oldest_ns == wire.now_ns


def test_a_fault_is_read_whatever_it_lacks() -> None:
    """A controller that names nothing, as one of an earlier version does."""
    wire = Wire()
    wire.up()
    wire.hear((bytes([kinds.FAULT]) + msgpack.packb([40001, "no use"]), b""))
    assert wire.session.counters.faults == 1
