"""What is fuzzed: each door of the project that takes bytes from somebody else.

A target takes any bytes and returns. What it may raise it catches: the typed error of its door, and nothing else. Whatever
else comes out is a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from tests.fuzz import doors, edges, handshakes, recordings, sessions


class Target(NamedTuple):
    """One door.

    Attributes:
        name: Of the door.
        run: Feeds it some bytes. Raises: AssertionError, or whatever the door must not raise.
        seeds: Inputs that get far.
        modules: Of which coverage is told.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]
    modules: tuple[str, ...]


TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        Target("zmtp-null", doors.zmtp_null, recordings.zmtp_streams, ("zfabric.zmtp",)),
        Target("zmtp-curve", doors.zmtp_curve, recordings.curve_streams, ("zfabric.zmtp",)),
        Target("zmtp-dealer", handshakes.zmtp_dealer, handshakes.server_streams, ("zfabric.zmtp",)),
        Target("zmtp-keyed", handshakes.zmtp_keyed, handshakes.keyed_streams, ("zfabric.zmtp",)),
        Target("wire", doors.wire, recordings.messages, ("zfabric.wire",)),
        Target("requests", doors.requests, recordings.requests, ("zfabric.wire",)),
        Target("results", edges.results, recordings.answers, ("zfabric.wire", "zfabric.client")),
        Target("gateway", edges.gateway, recordings.bodies, ("zfabric.gateway",)),
        Target("recording", edges.recording, recordings.recorded, ("zfabric.recording",)),
        Target(
            "controller", sessions.controller, recordings.conversations, ("zfabric.core.controller", "zfabric.wire")
        ),
        Target("client", sessions.client, recordings.to_clients, ("zfabric.core.client", "zfabric.wire")),
        Target("worker", sessions.worker, recordings.to_workers, ("zfabric.core.worker", "zfabric.wire")),
        Target("upstream", doors.upstream, recordings.upstreams, ("zfabric.backends.hf_api",)),
    )
}


def run(target: Target, data: bytes) -> Exception | None:
    """Feed a target. Returns what must not have come out."""
    try:
        target.run(data)
    except Exception as error:  # noqa: BLE001 — that is what is looked for
        return error
    return None
