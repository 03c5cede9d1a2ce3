"""State diagrams: of the table of requests, and of what the machines do when each event is tried on them in each state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable
from typing import Any, Final

from tests.peers import FakeFabric, model
from zfabric import limits
from zfabric.core.client.session import ClientSession
from zfabric.core.controller.request_state import TRANSITIONS, RequestState
from zfabric.core.worker.session import WorkerSession
from zfabric.errors import ProtocolError, VersionMismatchError
from zfabric.wire import codec, kinds
from zfabric.wire.messages import Goodbye, ModelInfo, Welcome

Edge = tuple[str, str, str]
#: How Mermaid writes where a life begins and ends.
_OUTSIDE: Final = "[*]"
_NOBODY: Final = "not registered"

_WELCOME: Final = Welcome(
    version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=1, token=b"t", beat_ms=limits.BEAT_MS,
    lease_ms=limits.LEASE_MS, frame_bytes_max=limits.FRAME_BYTES_MAX,
)  # fmt: skip
_TO_A_PEER: Final[dict[str, codec.Frames]] = {
    "WELCOME": codec.pack(_WELCOME),
    "REFUSED": codec.pack_refused(VersionMismatchError("another version")),
    "UNKNOWN_SESSION": codec.pack_unknown_session(),
    "GOODBYE": codec.pack(Goodbye()),
}


def diagram(which: str) -> str:
    """A diagram in Mermaid, by the name that the page gives it."""
    edges = {
        "requests": _requests,
        "workers": _workers,
        "worker-session": _worker_session,
        "client-session": _client_session,
    }
    return _mermaid(edges[which]())


def _mermaid(edges: Iterable[Edge]) -> str:
    """Edges of the same ends are one arrow."""
    events: dict[tuple[str, str], list[str]] = {}
    for before, event, after in edges:
        events.setdefault((before, after), []).append(event)
    names = {name: name.replace(" ", "_") for ends in events for name in ends}
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{name}" as {short}' for name, short in names.items() if name != short]
    for (before, after), found in events.items():
        label = f" : {', '.join(dict.fromkeys(found))}" if any(found) else ""
        lines.append(f"    {names[before]} --> {names[after]}{label}")
    return "\n".join([*lines, "```"])


def _requests() -> list[Edge]:
    """`TRANSITIONS` as it stands, and where attempts come from."""
    born = [RequestState.QUEUED, RequestState.RECOVERED, RequestState.CLAIMED]
    edges = [(_OUTSIDE, word, state.name) for word, state in zip(("SUBMIT", "CARRIED", "CLAIMS"), born, strict=True)]
    for state, following in TRANSITIONS.items():
        edges += [(state.name, event.name, after.name) for event, after in following.items() if after is not state]
    return [*edges, (RequestState.DONE.name, "", _OUTSIDE)]


# ── a worker at its controller ────────────────────────────────────────────────────────────────────────────────────────


def _workers() -> list[Edge]:
    """Every event in every state of a worker at a real broker."""
    register: Callable[[FakeFabric], object] = lambda fabric: fabric.worker("w", model())  # noqa: E731
    events: dict[str, Callable[[FakeFabric], object]] = {
        "WORKER_HELLO": lambda fabric: fabric.worker("w", model(), again=True),
        "LOAD": lambda fabric: fabric.load("w"),
        "LOAD with draining": lambda fabric: fabric.load("w", draining=True),
        "an operator drains it": lambda fabric: fabric.query("operator", "drain", worker="w", limit_ms=0),
        "GOODBYE": lambda fabric: fabric.leave("w"),
        "connection lost": lambda fabric: fabric.lose("w"),
        "silent for lease_ms": lambda fabric: fabric.pass_ms(2 * limits.LEASE_MS),
    }
    edges = [(_OUTSIDE, "", _NOBODY)]
    edges += _tried(_NOBODY, [], {"WORKER_HELLO": register})
    edges += _tried("READY", [register], events)
    edges += _tried("DRAINING", [register, events["LOAD with draining"]], events)
    return [edge for edge in edges if edge[0] != edge[2]]


def _tried(
    state: str, way: list[Callable[[FakeFabric], object]], events: dict[str, Callable[[FakeFabric], object]]
) -> list[Edge]:
    edges = []
    for name, happen in events.items():
        fabric = FakeFabric()
        fabric.client("operator")
        for step in way:
            step(fabric)
        assert _state_of(fabric) == state
        happen(fabric)
        edges.append((state, name, _state_of(fabric)))
    return edges


def _state_of(fabric: FakeFabric) -> str:
    worker = fabric.broker.registry.workers.get("w")
    return worker.state.name if worker is not None else _NOBODY


# ── a session at its peer ─────────────────────────────────────────────────────────────────────────────────────────────


def _worker_session() -> list[Edge]:
    def made() -> WorkerSession:
        session = WorkerSession(name="w", instance=1, rng=random.Random(1))
        session.announce([ModelInfo(name="m")], 0)
        return session

    return _session(made, lambda session: session.registered)


def _client_session() -> list[Edge]:
    return _session(lambda: ClientSession(instance=1, rng=random.Random(1), secret=b"s"), lambda session: session.ready)


def _session(make: Callable[[], Any], is_open: Callable[[Any], bool]) -> list[Edge]:
    """Every message and every change of the connection in every state of a real session."""
    states = {"no connection": 0, "HELLO said": 1, "session open": 2}
    edges = [(_OUTSIDE, "", "no connection")]
    for state, steps in states.items():
        happenings = ["connection up"] if not steps else ["connection lost", *_TO_A_PEER]
        for name in happenings:
            session, linked = make(), steps > 0
            if steps:
                session.connected(0)
            if steps == 2:
                session.receive(*_TO_A_PEER["WELCOME"], 0)
            if name == "connection up":
                session.connected(0)
                linked = True
            elif name == "connection lost":
                session.disconnected()
                linked = False
            else:
                with contextlib.suppress(ProtocolError):
                    session.receive(*_TO_A_PEER[name], 0)
            after = "no connection" if not linked else "session open" if is_open(session) else "HELLO said"
            edges.append((state, name, after))
    return [edge for edge in edges if edge[0] != edge[2]]
