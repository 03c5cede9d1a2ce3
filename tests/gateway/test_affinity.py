"""What callers say belongs together runs at one worker, whichever way they say it."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.fabric import fabric
from tests.gateway.backends import Recorder
from zfabric import AsyncClient
from zfabric.gateway.affinity import affinity_of, with_session
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.server import Gateway
from zfabric.limits import AFFINITY_LENGTH_MAX

LONG = "a trajectory of many turns, " * 10 + "and a last one"


def named(way: str, session: str) -> dict[str, Any]:
    """Arguments of OpenAI's client that name a session."""
    if way == "prompt_cache_key":
        return {"extra_body": {"prompt_cache_key": session}}
    return {"extra_headers": {"X-Session-Id": session}}


@pytest.mark.parametrize("way", ["prompt_cache_key", "x-session-id"])
async def test_a_session_stays_at_one_worker(way: str) -> None:
    sessions = ["a", "b", LONG, LONG + "!"]
    recorders = [Recorder(), Recorder()]
    async with fabric("tcp://127.0.0.1:*", policy="sticky_least_loaded") as made:
        for number, recorder in enumerate(recorders):
            await made.add_worker(f"w{number}", recorder)
        async with (
            Gateway(GatewayConfig(port=0), lambda _: AsyncClient(made.endpoint)) as gateway,
            AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as openai,
        ):
            for turn in range(6):
                for position, session in enumerate(sessions):
                    said: Any = [{"role": "user", "content": f"{position}"}]
                    if turn % 2:
                        await openai.completions.create(model="recorder", prompt=f"{position}", **named(way, session))
                    else:
                        await openai.chat.completions.create(model="recorder", messages=said, **named(way, session))
    places = [{request.plain_text() for request in recorder.requests} for recorder in recorders]
    assert places[0] | places[1] == {"0", "1", "2", "3"}
    assert not places[0] & places[1]
    assert sum(len(recorder.requests) for recorder in recorders) == 24


def test_the_body_has_the_word_before_the_header() -> None:
    headers = {b"x-session-id": b"of the header"}
    assert with_session({"affinity": "of the body"}, headers) == {"affinity": "of the body"}
    assert with_session({"seed": 1}, headers) == {"seed": 1, "affinity": "of the header"}
    assert with_session({"seed": 1}, {b"x-session-id": b""}) == {"seed": 1}


def test_a_long_name_is_hashed_to_a_key_of_its_own() -> None:
    longest = "x" * AFFINITY_LENGTH_MAX
    assert affinity_of(longest) == longest
    hashed = affinity_of(longest + "x")
    assert len(hashed) <= AFFINITY_LENGTH_MAX
    assert hashed != affinity_of(longest + "y")


async def test_a_name_is_no_part_of_a_count() -> None:
    async with fabric("tcp://127.0.0.1:*") as made:
        await made.add_worker("w")
        async with (
            Gateway(GatewayConfig(port=0), lambda _: AsyncClient(made.endpoint)) as gateway,
            AsyncOpenAI(base_url=gateway.url, api_key="none", max_retries=0) as openai,
        ):
            asked = {"model": "echo", "messages": [{"role": "user", "content": "a b"}], "prompt_cache_key": "k"}
            told: Any = await openai.post("/v1/messages/count_tokens", cast_to=object, body=asked)
    assert told["input_tokens"] > 0
