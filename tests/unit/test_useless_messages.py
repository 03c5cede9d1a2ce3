"""Messages that the controller cannot use: each is answered to its sender, what it was about ends, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest

from tests.broker import Bench, FakeClient, Peer, beat, faults, model_of
from zfabric.errors import (
    FabricError,
    NoWorkerError,
    ParameterRangeError,
    ProtocolError,
    RequestError,
    TooLargeError,
    VersionMismatchError,
    from_wire,
)
from zfabric.limits import BAD_FRAMES_MAX, DETAILS_MAX, FRAME_BYTES_GOAL, HEADER_BYTES_MAX, MESSAGE_LENGTH_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.flow import Credit, CreditLine
from zfabric.wire.load import Load
from zfabric.wire.messages import ClientHello, Drain, Submit, Welcome, WorkerHello
from zfabric.wire.questions import Answer
from zfabric.wire.status import ModelStatus, WorkerStatus

PROTOCOL = ProtocolError.code


def submit_header(*fields: object) -> bytes:
    return bytes([kinds.SUBMIT, *msgpack.packb(list(fields))])


@pytest.mark.parametrize(
    "header",
    [
        submit_header(5, 0, "sing", "m"),
        submit_header(5, 0, "generate", "m", 10**6),
        submit_header(5, 0, "generate", "m" * HEADER_BYTES_MAX),
        submit_header(5, 0, "generate", "m")[:-1],
        submit_header(5, 0),
        submit_header(5, 0, "generate", b"\xff", {}),
    ],
)
def test_a_submit_that_cannot_be_used_is_named(header: bytes) -> None:
    bench = Bench()
    bench.worker()
    client = bench.client()
    client.send(header, b"x")
    (fault,) = faults(client)
    assert (fault.code, fault.request, fault.attempt, fault.query) == (PROTOCOL, 5, 0, None)


def test_what_a_useless_submit_replaces_ends_with_it() -> None:
    """The client hears that this attempt is over, so nobody waits for the former one either."""
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(5)
    client.submit(6)
    client.send(submit_header(5, 1, "sing", "m"), b"x")
    assert faults(client)[0].attempt == 1
    assert worker.aborted() == [(5, 0)]
    worker.end(11, (6, 0))
    assert client.codes()[6, 0] == 0
    bench.check_rest()


def test_a_useless_submit_of_a_former_attempt_touches_nothing() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(5, 2)
    client.send(submit_header(5, 1, "sing", "m"), b"x")
    assert worker.aborted() == []


def query_header(number: int, *rest: object) -> bytes:
    return bytes([kinds.QUERY, *msgpack.packb([number, *rest])])


@pytest.mark.parametrize(
    "header",
    [
        query_header(9, "models", 5),
        query_header(9, "models", {1: 2}),
        query_header(9, ""),
        query_header(9, "models", {"kind": msgpack.ExtType(5, b"x" * 200)})[:-3],
        query_header(9, "models", {"a": "b" * 300})[:-1],
    ],
)
def test_a_query_that_cannot_be_used_is_named(header: bytes) -> None:
    client = Bench().client()
    client.send(header)
    (fault,) = faults(client)
    assert (fault.code, fault.query, fault.request) == (PROTOCOL, 9, None)


@pytest.mark.parametrize(
    ("what", "arguments", "error"),
    [
        ("models", {"kind": "x" * 300}, ParameterRangeError),
        ("models", {"kind": ["x"] * 1_000}, ParameterRangeError),
        ("models", {"kind": "nice"}, RequestError),
        ("models", {"kind": msgpack.ExtType(5, b"")}, ParameterRangeError),
        ("model", {"name": b"m"}, ParameterRangeError),
        ("model", {}, FabricError),
        ("drain", {"worker": {"a": 1}}, ParameterRangeError),
        ("drain", {"worker": "nobody"}, NoWorkerError),
        ("drain", {"worker": "w", "limit_ms": -1}, ParameterRangeError),
        ("drain", {"worker": "w", "limit_ms": "soon"}, ParameterRangeError),
        ("drain", {"worker": "w", "limit_ms": 2**64 - 1}, ParameterRangeError),
        ("dance", {}, RequestError),
    ],
)
def test_each_query_is_answered(what: str, arguments: dict[str, object], error: type[FabricError]) -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.send(bytes([kinds.QUERY]) + msgpack.packb([9, what, arguments]))
    (answer,) = client.take(Answer)
    assert answer.number == 9
    assert isinstance(from_wire(answer.code, answer.message, answer.details), error)
    assert len(answer.message) <= MESSAGE_LENGTH_MAX
    assert worker.take(Drain) == []


# ── too many of them ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_peer_that_is_ignored_is_told_so() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), bench.client(), bench.client(12)
    client.submit(5)
    other.submit(6)
    for _ in range(BAD_FRAMES_MAX - 1):
        client.send(b"\xfe")
    assert client.refusal is None
    client.send(b"\xfe")
    assert client.refusal == PROTOCOL
    assert len(faults(client)) == BAD_FRAMES_MAX
    assert worker.aborted() == [(5, 0)]
    client.inbox.clear()
    client.submit(7)
    beat(client)
    assert client.kinds() == []
    client.hello(11)
    assert client.refusal == PROTOCOL
    assert not client.take(Welcome)
    again = bench.client(11)
    assert again.refusal is None
    worker.end(12, (6, 0))
    assert other.codes() == {(6, 0): 0}


def test_a_worker_that_is_ignored_is_told_so_and_its_requests_go_elsewhere() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(5)
    for _ in range(BAD_FRAMES_MAX):
        worker.send(bytes([kinds.LOAD]) + b"\x91\xc0")
    assert worker.refusal == PROTOCOL
    (end,) = client.terminals()
    assert "claim_ms" not in end.details
    assert bench.broker.registry.workers == {}


# ── faults of the program ───────────────────────────────────────────────────────────────────────────────────────────


class _BugError(Exception):
    """Something that nobody thought of."""


def break_down(*_: object, **__: object) -> None:
    raise _BugError("nobody thought of this")


@pytest.mark.parametrize("place", ["submit", "query"])
def test_a_bug_that_a_message_finds_ends_what_the_message_was_about(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    told: list[tuple[str, int]] = []
    bench.broker.on_bug = lambda error, kind: told.append((type(error).__name__, kind))
    worker, client = bench.worker(), bench.client()
    client.submit(6)
    if place == "submit":
        monkeypatch.setattr(bench.broker.scheduler.endings, "place", break_down)
        client.submit(5)
        (fault,) = faults(client)
        assert (fault.request, fault.attempt) == (5, 0)
        assert list(bench.broker.registry.clients[11].requests) == [6]
        assert told == [("_BugError", kinds.SUBMIT)]
    else:
        monkeypatch.setattr("zfabric.core.controller.status.fabric_status", break_down)
        client.ask("status")
        (fault,) = faults(client)
        assert fault.query == 7
        assert told == [("_BugError", kinds.QUERY)]
    monkeypatch.undo()
    worker.end(11, (6, 0))
    assert client.codes()[6, 0] == 0
    assert bench.broker.bad_frames == 0


def test_a_bug_in_a_timer_stops_no_other() -> None:
    bench = Bench()
    told: list[str] = []
    bench.broker.on_bug = lambda error, kind: told.append(type(error).__name__)
    worker, client = bench.worker(slots=1), bench.client()
    client.submit(5)
    client.submit(6, deadline_ms=100)
    bench.broker.timers.at(bench.now_ns, break_down)
    bench.sleep(200)
    assert told == ["_BugError"]
    assert set(client.codes()) == {(6, 0)}
    assert worker.aborted() == []


# ── hellos ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [kinds.CLIENT_HELLO, kinds.WORKER_HELLO])
@pytest.mark.parametrize("rest", [[], ["build", 11], ["another", {"form": "of"}, "HELLO"]])
@pytest.mark.parametrize("version", [0, kinds.PROTOCOL_VERSION - 1, kinds.PROTOCOL_VERSION + 1, 2**40])
def test_another_version_is_told_whatever_its_hello_looks_like(kind: int, rest: list[object], version: int) -> None:
    peer = FakeClient(Bench())
    peer.send(bytes([kind]) + msgpack.packb([version, *rest]))
    ((told, fault, _),) = peer.inbox
    assert (told, fault.code) == (kinds.REFUSED, VersionMismatchError.code)
    assert fault.details == {"peer": version, "controller": kinds.PROTOCOL_VERSION}
    assert f"version {version} " in fault.message
    assert f"speaks {kinds.PROTOCOL_VERSION} alone" in fault.message


def test_a_client_that_says_hello_again_is_welcome_again_and_nothing_else_happens() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(5)
    (first,) = client.take(Welcome)
    client.hello(11)
    (second,) = client.take(Welcome)
    assert (first.session, first.token) == (second.session, second.token)
    assert faults(client) == []
    worker.end(11, (5, 0))
    assert client.codes() == {(5, 0): 0}


@pytest.mark.parametrize(
    "act",
    [
        lambda bench, client, worker: client.send(hello_of("w2", 1)),
        lambda bench, client, worker: worker.send(ClientHello(version=kinds.PROTOCOL_VERSION, build="", instance=99)),
        lambda bench, client, worker: worker.send(hello_of("w2", 1)),
        lambda bench, client, worker: worker.send(hello_of("w", 2)),
        lambda bench, client, worker: client.send(Load(slots=9)),
        lambda bench, client, worker: worker.send(Submit(request=1, attempt=0, operation="generate", model="m"), b"x"),
        lambda bench, client, worker: worker.send(Credit([CreditLine(request=5, attempt=0, next=0, window=9)])),
        lambda bench, client, worker: client.send(b""),
        lambda bench, client, worker: worker.send(b"\x01"),
    ],
)
def test_a_session_is_what_its_first_hello_said(act: Callable[[Bench, FakeClient, Peer], None]) -> None:
    """But for a client that has taken another number, which begins anew: see test_lost_connections."""
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(5)
    act(bench, client, worker)
    assert set(bench.broker.registry.clients) == {11}
    assert set(bench.broker.registry.workers) == {"w"}
    worker.end(11, (5, 0))
    assert client.codes() == {(5, 0): 0}


def hello_of(name: str, instance: int) -> WorkerHello:
    load = Load(slots=1)
    return WorkerHello(
        version=kinds.PROTOCOL_VERSION, build="", name=name, instance=instance, models=[model_of("m")], load=load
    )


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_list_is_answered_in_parts() -> None:
    bench = Bench()
    bench.checking = False
    for number in range(40):
        models = [model_of("m" * 200 + f"{number}.{model}") for model in range(1_000)]
        bench.worker(f"w{number:02}", models=models)
    client = bench.client()
    client.send(bytes([kinds.QUERY]) + msgpack.packb([9, "workers", {}]))
    sizes = [len(codec.pack(message)[0]) for _, message, _ in client.inbox if isinstance(message, Answer)]
    answers = client.take(Answer)
    assert len(answers) >= 2
    assert max(sizes) <= FRAME_BYTES_GOAL
    assert [answer.more for answer in answers] == [True] * (len(answers) - 1) + [False]
    rows = [row for answer in answers for row in codec.unpack_result(bytes(answer.result), list[WorkerStatus])]
    assert [row.name for row in rows] == [f"w{number:02}" for number in range(40)]
    assert all(len(row.models) == 1_000 for row in rows)


def test_an_empty_list_is_one_answer() -> None:
    (answer,) = Bench().client().ask("workers")
    assert not answer.more
    assert codec.unpack_result(bytes(answer.result), list[WorkerStatus]) == []


def test_a_row_that_does_not_fit_is_an_error_of_the_query_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.core.controller.queries._ROOM", 1_000)
    bench = Bench()
    bench.worker(models=[model_of("x" * 200 + str(number)) for number in range(10)])
    (answer,) = bench.client().ask("workers")
    assert answer.code == TooLargeError.code
    assert len(bench.client(12).ask("models")) > 1


def test_what_a_worker_tells_of_a_model_is_shown_within_bounds() -> None:
    """One worker's essay on its model must not keep everybody from the list."""
    bench = Bench()
    details = {f"{number}" * 300: "y" * 100_000 for number in range(35)}
    bench.worker(models=[model_of("m", details=details)])
    (answer,) = bench.client().ask("models")
    (row,) = codec.unpack_result(bytes(answer.result), list[ModelStatus])
    assert len(row.details) <= DETAILS_MAX
    assert max(len(str(value)) for value in row.details.values()) <= MESSAGE_LENGTH_MAX


def test_the_terminals_of_a_lost_worker_fit_their_receiver() -> None:
    bench = Bench()
    bench.checking = False
    worker, client = bench.worker("\N{GRINNING FACE}" * 256, slots=20_000), bench.client()
    for number in range(20_000):
        client.submit(number)
    client.inbox.clear()
    worker.cut()
    sizes = [
        (len(codec.pack_envelope(message)), len(body)) for kind, message, body in client.inbox if kind == kinds.ENDS
    ]
    assert len(sizes) > 5
    assert max(map(max, sizes)) <= FRAME_BYTES_GOAL
    assert len(client.codes()) == 20_000


def test_aborts_and_grants_of_many_requests_fit_their_receiver() -> None:
    bench = Bench(client_requests_max=200_000)
    bench.checking = False
    worker, client = bench.worker(slots=65_536), bench.client(secret=b"s")
    worker.slow = True
    for number in range(65_600):
        client.submit(2**62 + number)
    client.cut()
    again = client.back(*[(2**62 + number, 0, 0) for number in range(65_536)])
    assert len(worker.grants()) == 65_536
    again.leave()
    messages = [message for kind, message, _ in worker.inbox if kind == kinds.ABORT]
    assert max(len(codec.pack(message)[0]) for message in messages) <= FRAME_BYTES_GOAL
    assert len(worker.aborted()) == 65_536
