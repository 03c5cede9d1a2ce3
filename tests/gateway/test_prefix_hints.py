"""Further turns of a conversation go where the first one went, whichever way they come."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.service import Controller
from zfabric.core.controller.placement import PrefixFigures
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.server import Gateway

CHAT: list[Any] = [
    {"role": "system", "content": "You know all of the rules of this house. " * 100},
    {"role": "user", "content": "Which one is the first?"},
]
DISPATCH = Path(__file__).resolve().parents[2] / "docs" / "dispatch.md"


def figures(controller: Controller) -> PrefixFigures:
    return controller.broker.registry.placement.figures["prefix_aware"]


@pytest.mark.parametrize("hints", [True, False])
async def test_a_gateway_and_the_library_find_each_others_prompts(hints: bool) -> None:
    async with fabric("tcp://127.0.0.1:*", policy="prefix_aware") as made, AsyncClient(made.endpoint) as client:
        for name in ("a", "b", "c"):
            await made.add_worker(name)
        config = GatewayConfig(port=0, prefix_hints=hints)
        async with (
            Gateway(config, lambda _: AsyncClient(made.endpoint)) as gateway,
            AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as openai,
        ):
            await openai.chat.completions.create(model="echo", messages=CHAT, max_tokens=2)
            await openai.completions.create(model="echo", prompt="once upon a time " * 20, max_tokens=2)
        if not hints:
            assert made.controller.broker.registry.placement.figures == {}
            return
        assert (figures(made.controller).dispatches, figures(made.controller).hits) == (2, 0)
        further = [*CHAT, {"role": "assistant", "content": "None."}, {"role": "user", "content": "And the last?"}]
        await client.generate("echo", messages=further, max_new_tokens=2, prefix_hints=True)
        await client.generate("echo", "once upon a time " * 30, max_new_tokens=2, prefix_hints=True)
        found = figures(made.controller)
        assert (found.dispatches, found.hits, found.regret_tokens) == (4, 2, 0)


async def test_turns_stay_at_one_worker_while_others_are_idle() -> None:
    async with fabric("tcp://127.0.0.1:*", policy="prefix_aware") as made, AsyncClient(made.endpoint) as client:
        for name in ("a", "b", "c"):
            await made.add_worker(name)
        messages, workers = list(CHAT), set()
        for turn in range(8):
            answer = await client.generate("echo", messages=messages, max_new_tokens=4, prefix_hints=True)
            workers.add(answer.worker)
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": f"And {turn}?"}]
        assert len(workers) == 1


async def test_what_the_page_shows_works_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", DISPATCH.read_text(), re.DOTALL)
    async with fabric("tcp://127.0.0.1:*", policy="prefix_aware") as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("a", EchoWorker(EchoOptions(model_names=("smollm2",))))
        names: dict[str, Any] = {"client": client, "messages": CHAT}
        exec("async def shown():\n" + "".join(f"    {line}\n" for line in block.splitlines()), names)
        await names["shown"]()
        assert capsys.readouterr().out
        assert figures(made.controller).dispatches == 1
