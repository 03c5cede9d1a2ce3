"""Connections that stop short of a session: how many the loop's driver keeps, for how long, and which one goes first."""

from __future__ import annotations

import asyncio

import pytest

from tests.fabric import echo_fabric
from tests.integration.test_loop_links import HELLO, AtRouter
from tests.integration.test_transports import DEALER_READY, Rogue, Side, rogues, side
from tests.unit.test_zmtp import GREETING, ROUTER_READY
from zfabric import limits
from zfabric.ids import RoutingId
from zfabric.transport.loop_router import LoopRouter

__all__ = ["rogues"]


async def half_open(endpoint: str) -> Rogue:
    """A connection that the router has taken, and that says nothing."""
    rogue = Rogue(endpoint)
    await _read(rogue, len(GREETING))
    return rogue


async def greeted(endpoint: str) -> Rogue:
    """A connection whose handshake is over, and that says no HELLO."""
    rogue = Rogue(endpoint)
    await rogue.send(GREETING + DEALER_READY)
    await _read(rogue, len(GREETING + ROUTER_READY))
    return rogue


async def _read(rogue: Rogue, missing: int) -> None:
    while missing:
        data = await asyncio.get_running_loop().sock_recv(rogue.wire, missing)
        assert data
        missing -= len(data)


async def say_hello(made: Side, rogue: Rogue) -> RoutingId:
    await rogue.send(bytes([0, len(HELLO)]) + HELLO)
    return (await made.at.next())[0]


async def test_the_oldest_half_open_connection_goes(
    endpoint: str, rogues: list[Rogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SOURCE_HANDSHAKES_MAX", 3)
    async with side(endpoint, "loop", "loop") as made:
        for _ in range(5):
            rogues.append(await half_open(made.link.endpoints[0]))
        assert [await rogue.ended() for rogue in rogues[:2]] == [b"", b""]
        figures = made.link.counted()
        assert (figures["handshakes"], figures["displaced"], figures["handshakes_refused"]) == (3, 2, 0)
        # Whoever goes on is one of them no more, and whoever is honest gets in beside them.
        await rogues[2].send(GREETING + DEALER_READY)
        await _read(rogues[2], len(ROUTER_READY))
        await made.greeted()
        assert made.link.counted()["handshakes"] == 2
        rogues[3].wire.close()
        while made.link.counted()["handshakes"] != 1:
            await asyncio.sleep(0.001)


async def test_the_oldest_that_is_greeted_and_silent_goes_and_nobody_with_a_session(
    endpoint: str, rogues: list[Rogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SOURCE_SESSIONLESS_MAX", 3)
    known: set[RoutingId] = set()
    async with side(endpoint, "loop", "loop") as made:
        made.link.is_known = known.__contains__
        where = made.link.endpoints[0]
        honest = await greeted(where)
        refused = await greeted(where)
        rogues += honest, refused
        take = made.at.link_message

        def admit_the_first(sender: RoutingId, header: bytes, body: bytes) -> None:
            if not known:
                known.add(sender)
            take(sender, header, body)

        monkeypatch.setattr(made.at, "link_message", admit_the_first)
        name = await say_hello(made, honest)
        assert known == {name}
        for _ in range(2):
            rogues.append(await greeted(where))
        assert made.link.counted()["sessionless"] == 3
        # A HELLO that is refused is no silence.
        assert await say_hello(made, refused) not in known
        for _ in range(2):
            rogues.append(await greeted(where))
        assert [await rogue.ended() for rogue in rogues[2:4]] == [b"", b""]
        assert made.link.counted()["displaced"] == 2
        assert await say_hello(made, refused)
        assert await say_hello(made, honest) == name


async def test_half_open_connections_hold_no_place_at_another_socket(
    ipc: str, rogues: list[Rogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OPEN_HANDSHAKES_MAX", 1)
    link = LoopRouter((ipc, "tcp://127.0.0.1:*"), {}, AtRouter())
    try:
        for where in (link.endpoints[0], *[link.endpoints[1]] * 3):
            rogues.append(await half_open(where))
        assert [await rogue.ended() for rogue in rogues[1:3]] == [b"", b""]
        assert (link.counted()["handshakes"], link.counted()["displaced"]) == (2, 2)
    finally:
        await link.close()


async def test_whoever_is_silent_is_ended_in_time_and_sessions_go_on(
    ipc: str, rogues: list[Rogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZFABRIC_TRANSPORT", "loop")
    async with echo_fabric(ipc) as (fabric, client):
        assert (await client.generate("echo", "one two", max_new_tokens=1)).text
        sessions = dict(fabric.controller.broker.sessions.peers)
        rogues += [await greeted(ipc) for _ in range(5)]
        assert fabric.controller._figures()["sessionless"] == 5
        monkeypatch.setattr(limits, "SESSIONLESS_MS", 0)
        for rogue in rogues:
            await rogue.ended()
        figures = fabric.controller._figures()
        assert (figures["sessionless"], figures["sessionless_ended"]) == (0, 5)
        # The client's connection and the worker's are older than all of them.
        assert figures["connections"] == 2
        assert (await client.generate("echo", "one two", max_new_tokens=1)).text
        assert fabric.controller.broker.sessions.peers == sessions
