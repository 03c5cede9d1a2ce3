"""The tables of docs/protocol/behaviour.md against the three cores: what each answers to each message, in each state."""

from __future__ import annotations

import contextlib
import random
import re
from typing import Any

import pytest

from tests.broker import Bench, FakeClient, FakeWorker, Peer, carried_of, claim_of, model_of
from tests.document.pages import ROOT
from zfabric import limits
from zfabric.core.client.session import ClientSession
from zfabric.core.worker.session import Begin, DrainAsked, WorkerSession
from zfabric.errors import ProtocolError, WorkerLostError
from zfabric.ids import milliseconds
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.chunks import EndsBody
from zfabric.wire.flow import Abort, Cancel, Credit, CreditLine, Grant
from zfabric.wire.load import Load
from zfabric.wire.messages import (
    Beat,
    CarriedMore,
    Claims,
    ClientHello,
    Dispatch,
    Drain,
    End,
    Ends,
    Goodbye,
    Locate,
    Located,
    Submit,
    Welcome,
    WorkerHello,
)
from zfabric.wire.payloads import Delta, TextRequest
from zfabric.wire.questions import Answer, Query

_PAGE = (ROOT / "docs" / "protocol" / "behaviour.md").read_text()
_UNKNOWN = "anything else"
Cell = tuple[str, str, str]


def cells_of(heading: str) -> list[Cell]:
    """(message, state, what is said of it) of the first table below a heading."""
    _, _, below = _PAGE.partition(f"\n## {heading}\n")
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table is not None
    head, _, *rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in table[0].splitlines()]
    return [(row[0], state, text) for row in rows for state, text in zip(head[1:], row[1:], strict=True)]


def answers_in(cell: str) -> set[str]:
    """The kinds that a cell has an arrow before."""
    return set(re.findall(r"→ ([A-Z_]+)", cell))


def check(cell: Cell, said: set[str]) -> None:
    """An answer comes exactly where one is told, and is one of those that are told."""
    expected = answers_in(cell[2])
    assert said <= expected, cell
    assert bool(said) is bool(expected), cell


@pytest.mark.parametrize("heading", ["A controller", "A client", "A worker"])
def test_every_kind_has_its_row(heading: str) -> None:
    received = {
        "A controller": kinds.FROM_CLIENT | kinds.FROM_WORKER,
        "A client": kinds.TO_CLIENT,
        "A worker": kinds.TO_WORKER,
    }
    rows = {message for message, _, _ in cells_of(heading)}
    assert rows == {kinds.NAMES[kind] for kind in received[heading]} | {_UNKNOWN}


# ── a controller ──────────────────────────────────────────────────────────────────────────────────────────────────────

_TO_CONTROLLER: dict[str, tuple[bytes, bytes]] = {
    "CLIENT_HELLO": codec.pack(ClientHello(version=kinds.PROTOCOL_VERSION, build="", instance=11)),
    "WORKER_HELLO": codec.pack(
        WorkerHello(version=kinds.PROTOCOL_VERSION, build="", name="v", instance=1, models=[], load=Load(), beats=False)
    ),
    "SUBMIT": (codec.pack_envelope(Submit(request=6, attempt=0, operation="generate", model="nobody's")), b"x"),
    "CANCEL": codec.pack(Cancel([5])),
    "CREDIT": codec.pack(Credit([CreditLine(request=5, attempt=0, next=0, window=9)])),
    "CLAIMS": codec.pack(Claims([claim_of(77, 0, 0)])),
    "QUERY": codec.pack(Query(number=1, what="status")),
    "BEAT": codec.pack(Beat(3)),
    "LOAD": codec.pack(Load()),
    "CARRIED": codec.pack(CarriedMore([carried_of(99, 1)])),
    "LOCATED": codec.pack(Located(number=1, carried=[carried_of(99, 1)])),
    "CHUNKS": codec.pack_chunks(1, []),
    "ENDS": (codec.pack_envelope(Ends(instance=11, ends=[])), codec.encode(EndsBody())),
    "GOODBYE": codec.pack(Goodbye()),
    _UNKNOWN: (b"\x7f", b""),
}


def _connection(bench: Bench, state: str) -> Peer:
    """A connection in a state, of which nothing is in the inbox."""
    peer: Peer
    if state == "a worker's session":
        peer = FakeWorker(bench).hello("v")
    elif state == "a client's session":
        peer = client = FakeClient(bench).hello(11)
        client.submit(5)
    else:
        peer = FakeClient(bench)
        if state == "not listened to any more":
            peer.send(_TO_CONTROLLER["CLIENT_HELLO"][0])
            for _ in range(limits.BAD_FRAMES_MAX):
                peer.send(b"\x7f")
    peer.inbox.clear()
    return peer


@pytest.mark.parametrize("cell", cells_of("A controller"), ids=lambda cell: f"{cell[0]}-{cell[1]}")
def test_a_controller_answers_what_the_table_says(cell: Cell) -> None:
    bench = Bench()
    bench.worker("w", slots=0, models=[model_of("m")])
    peer = _connection(bench, cell[1])
    peer.send(*_TO_CONTROLLER[cell[0]])
    check(cell, set(peer.kinds()))


# ── the two others ────────────────────────────────────────────────────────────────────────────────────────────────────


def _welcome(beat_ms: int = limits.DEADLINE_MAX_MS) -> codec.Frames:
    welcome = Welcome(
        version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=3, token=b"t", beat_ms=beat_ms, lease_ms=3 * beat_ms,
        frame_bytes_max=limits.FRAME_BYTES_MAX,
    )  # fmt: skip
    return codec.pack(welcome)


def _dispatch(request: int, body: bytes) -> codec.Frames:
    envelope = Dispatch(client=3, instance=7, request=request, attempt=0, operation="generate", model="m")
    return codec.pack_envelope(envelope), body


_LOST = WorkerLostError("the worker is lost")
_FROM_CONTROLLER: dict[str, codec.Frames] = {
    "REFUSED": codec.pack_refused(ProtocolError("no")),
    "UNKNOWN_SESSION": codec.pack_unknown_session(),
    "GOODBYE": codec.pack(Goodbye()),
    "BEAT": codec.pack(Beat()),
    "FAULT": codec.pack_fault(ProtocolError("no"), codec.Subject(request=1)),
    "ANSWER": codec.pack(Answer(number=1, code=0)),
    "DISPATCH": _dispatch(6, b"\xc1"),
    "GRANT": codec.pack(
        Grant(client=3, instance=7, lines=[CreditLine(request=5, attempt=0, next=0, window=9, again=True)])
    ),
    "ABORT": codec.pack(Abort(instance=7, attempts=[(99, 0)])),
    "LOCATE": codec.pack(Locate(number=1, instance=7, attempts=[(99, 0)])),
    "DRAIN": codec.pack(Drain(0)),
    _UNKNOWN: (b"\x7f", b""),
}


class _Nobody:
    """Reads answers of all kinds, and does nothing with them."""

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None: ...

    def ended(self, *_: object) -> None: ...

    def answered(self, *_: object) -> None: ...


def _said(session: ClientSession | WorkerSession) -> set[str]:
    return {kinds.NAMES[header[0]] for header, _ in session.outbox}


@pytest.mark.parametrize("cell", cells_of("A client"), ids=lambda cell: f"{cell[0]}-{cell[1]}")
def test_a_client_answers_what_the_table_says(cell: Cell) -> None:
    session = ClientSession(instance=7, rng=random.Random(1))
    session.connected(0)
    pending = session.submit("generate", TextRequest(prompt="p"), _Nobody(), 0, model="m")
    session.ask("status", {}, _Nobody(), 0)
    if cell[1] == "session open":
        session.receive(*_welcome(), 0)
    session.outbox.clear()
    ends = Ends(instance=7, ends=[End(request=pending.number, attempt=0, code=_LOST.code)])
    messages = _FROM_CONTROLLER | {
        "WELCOME": _welcome(),
        "CHUNKS": codec.pack_chunks(3, [Chunk(pending.number, 0, 0, 0, "a", [1])]),
        "ENDS": (codec.pack_envelope(ends), codec.encode(EndsBody(outcomes=[Outcome()]))),
    }
    with contextlib.suppress(ProtocolError):
        session.receive(*messages[cell[0]], 0)
    session.flush()
    if cell[1] == "session open":
        session.tick(milliseconds(limits.HELLO_RETRY_MS))
    check(cell, _said(session))


@pytest.mark.parametrize("cell", cells_of("A worker"), ids=lambda cell: f"{cell[0]}-{cell[1]}")
def test_a_worker_answers_what_the_table_says(cell: Cell) -> None:
    session = WorkerSession(name="w", instance=1, rng=random.Random(1))
    session.announce([model_of("m")], 0)
    session.connected(0)
    if cell[1] == "session open":
        session.receive(*_welcome(), 0)
        (begin,) = session.receive(*_dispatch(5, codec.encode(TextRequest(prompt="p"))), 0)
        assert isinstance(begin, Begin)
        session.emit([(begin.request_id, Delta(text="a", token_ids=[1]))], 0)
        session.flush()
    session.outbox.clear()
    orders: Any = ()
    with contextlib.suppress(ProtocolError):
        orders = session.receive(*(_FROM_CONTROLLER | {"WELCOME": _welcome(limits.BEAT_MS)})[cell[0]], 0)
    if any(isinstance(order, DrainAsked) for order in orders):
        session.drain(0)
    if cell[1] == "session open" or cell[0] == "WELCOME":
        session.tick(milliseconds(limits.HELLO_RETRY_MS))
    check(cell, _said(session))
