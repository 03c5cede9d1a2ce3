"""What one engine alone knows, over HTTP: vLLM's own fields, `extra` for all others, and what engines tell besides."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.gateway.conftest import gateway
from zfabric import BaseModelWorker, Delta, GenerateRequest, ModelInfo
from zfabric.backends.echo import EchoWorker

FIELDS = {
    "cache_salt": "s", "kv_transfer_params": {"a": 1}, "include_stop_str_in_output": True, "allowed_token_ids": [1, 2],
    "detokenize": False, "vllm_xargs": {"b": 2}, "extra": {"colour": "red"},
}  # fmt: skip
EXTRA = {
    "cache_salt": "s", "kv_transfer_params": {"a": 1}, "include_stop": True, "allowed_token_ids": [1, 2],
    "detokenize": False, "extra_args": {"b": 2}, "colour": "red",
}  # fmt: skip


class Engine(BaseModelWorker):
    """Takes any key, and tells of three things, one of which is called as what the gateway itself says."""

    extra = None

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def load(self) -> ModelInfo:
        return ModelInfo(name="m", capabilities=["generate", "chat"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.asked.append(request.extra)
        yield Delta(text="a", token_ids=[1], extra={"system_fingerprint": "fp", "id": "theirs"})
        told = {"kv_transfer_params": {"remote_block_ids": [7]}}
        yield Delta(text="b", token_ids=[2], finish_reason="stop", extra=told)


async def test_fields_of_vllm_and_all_others_go_through_and_come_back() -> None:
    engine = Engine()
    async with gateway(engine) as served:
        messages: Any = [{"role": "user", "content": "x"}]
        chat = await served.openai.chat.completions.create(model="m", messages=messages, extra_body=FIELDS)
        text = await served.openai.completions.create(model="m", prompt="x", extra_body=FIELDS)
        for answer in (chat, text):
            told = answer.model_dump()
            assert told["system_fingerprint"] == "fp"
            assert told["kv_transfer_params"] == {"remote_block_ids": [7]}
            assert told["id"] != "theirs"
        native = await served.openai.post("/../generate", cast_to=object, body={"model": "m", "prompt": "x", **FIELDS})
        assert isinstance(native, dict)
        assert native["extra"]["kv_transfer_params"] == {"remote_block_ids": [7]}
        assert engine.asked == [EXTRA] * 3


async def test_a_stream_tells_them_when_they_are_known() -> None:
    async with gateway(Engine()) as served:
        messages: Any = [{"role": "user", "content": "x"}]
        chat = await served.openai.chat.completions.create(model="m", messages=messages, stream=True)
        text = await served.openai.completions.create(model="m", prompt="x", stream=True)
        for told in ([chunk.model_dump() async for chunk in chat], [chunk.model_dump() async for chunk in text]):
            assert [chunk["system_fingerprint"] for chunk in told if chunk.get("system_fingerprint")] == ["fp"]
            assert [chunk["kv_transfer_params"] for chunk in told if "kv_transfer_params" in chunk] == [
                {"remote_block_ids": [7]}
            ]
            assert len({chunk["id"] for chunk in told}) == 1


async def test_what_is_not_known_is_refused_and_what_holds_anyway_is_not() -> None:
    async with gateway(EchoWorker()) as served:

        async def ask(**fields: Any) -> Any:
            return await served.openai.completions.create(model="echo", prompt="a b", max_tokens=2, extra_body=fields)

        assert (await ask(detokenize=True, include_stop_str_in_output=False)).choices[0].text == "a b "
        for name, field in (("include_stop", "include_stop_str_in_output"), ("detokenize", "detokenize")):
            with pytest.raises(openai.BadRequestError) as refused:
                await ask(**{field: field != "detokenize"})
            assert json.loads(refused.value.response.content)["error"]["param"] == name
        with pytest.raises(openai.BadRequestError, match="give one"):
            await ask(cache_salt="a", extra={"cache_salt": "b"})
