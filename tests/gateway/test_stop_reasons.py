"""What ended an answer, as each API tells it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from tests.gateway.conftest import gateway
from zfabric import GenerateRequest, ModelInfo, TextModelWorker
from zfabric.backends.echo import EchoWorker

ASKED: list[Any] = [{"role": "user", "content": "Count."}]


class Counting(TextModelWorker):
    """Counts in words, the same whatever it is asked."""

    async def load(self) -> ModelInfo:
        return ModelInfo(name="counting", capabilities=["chat"])

    async def complete(self, prompt: str, request: GenerateRequest) -> AsyncIterator[str]:
        for word in ("one ", "two, ", "three ", "four"):
            yield word

    def render(self, messages: Any) -> str:
        return str(messages)


@pytest.mark.parametrize(
    ("stops", "text", "reason", "sequence"),
    [
        (["thr", "two"], "one ", "stop_sequence", "two"),
        (["never", "e f"], "one two, thre", "stop_sequence", "e f"),
        (["never"], "one two, three four", "end_turn", None),
        ([], "one two, three four", "end_turn", None),
    ],
)
async def test_a_message_tells_the_text_that_ended_it(
    stops: list[str], text: str, reason: str, sequence: str | None
) -> None:
    async with gateway(Counting()) as served:
        asked: Any = {"model": "counting", "max_tokens": 20, "messages": ASKED, "stop_sequences": stops}
        async with AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as anthropic:
            whole = await anthropic.messages.create(**asked)
            async with anthropic.messages.stream(**asked) as stream:
                streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert (message.content[0].text, message.stop_reason, message.stop_sequence) == (text, reason, sequence)  # type: ignore[union-attr]


async def test_chats_and_completions_tell_it_beside_the_finish_reason() -> None:
    async with gateway(Counting(), EchoWorker()) as served:
        chats = served.openai.chat.completions
        asked: Any = {"model": "counting", "messages": ASKED, "stop": ["x", "three"]}
        chat = await chats.create(**asked)
        *_, last = [event async for event in await chats.create(**asked, stream=True)]
        old = await served.openai.completions.create(
            model="echo", prompt=[5, 6, 7], max_tokens=9, extra_body={"stop_token_ids": [2]}
        )
        free = await chats.create(model="counting", messages=ASKED)
        library = await served.fabric.generate("counting", "Count.", stop=["three"])
    for choice in (chat.choices[0], last.choices[0]):
        assert (choice.finish_reason, choice.stop_reason) == ("stop", "three")
    assert (old.choices[0].finish_reason, old.choices[0].stop_reason) == ("stop", 2)  # type: ignore[attr-defined]
    assert "stop_reason" not in free.choices[0].to_dict()
    assert library.choices[0].stop_reason == "three"
    assert library.to_dict()["choices"][0]["stop_reason"] == "three"
