"""What a model does not announce is refused by name before its backend is asked, and what it announces it has to implement."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import zfabric.testing
from zfabric import BaseModelWorker, Delta, GenerateRequest, ModelInfo, StepwiseModelWorker
from zfabric.errors import ConfigurationError, UnsupportedOperationError, UnsupportedParameterError
from zfabric.worker.capabilities import check_announcement

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]


class Told(BaseModelWorker):
    """Notes what it is asked, and announces what a test wants."""

    def __init__(self, **announced: Any) -> None:
        self.announced = announced
        self.asked: list[GenerateRequest] = []

    async def load(self) -> ModelInfo:
        return ModelInfo(name="m", **self.announced)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.asked.append(request)
        yield Delta(text="made", token_ids=[1], finish_reason="stop")


async def test_what_the_class_implements_is_announced_where_nothing_else_is() -> None:
    async with zfabric.testing.serving(Told()) as client:
        info = await client.model_details("m")
        assert info.capabilities == ["generate"]
        assert info.parameters is None


async def test_a_backend_that_tells_nothing_of_parameters_is_handed_all_of_them() -> None:
    backend = Told(capabilities=["generate", "chat"])
    async with zfabric.testing.serving(backend) as client:
        await client.generate("m", "x", top_k=5, frequency_penalty=0.5, stop=["a"])
        await client.chat("m", [{"role": "user", "content": "x"}], tools=[TOOL])
    assert (backend.asked[0].sampling.top_k, backend.asked[1].tools) == (5, [TOOL])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": 5}, "top_k"),
        ({"tools": [TOOL]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_a_backend_that_honours_none_is_handed_none(options: dict[str, Any], name: str) -> None:
    backend = Told(capabilities=["generate", "chat"], parameters=[])
    messages = [{"role": "user", "content": "x"}]
    async with zfabric.testing.serving(backend) as client:
        assert (await client.chat("m", messages, max_new_tokens=4)).text == "made"
        with pytest.raises(UnsupportedParameterError, match=name):
            await client.chat("m", messages, **options)
    assert len(backend.asked) == 1


@pytest.mark.parametrize(
    ("capabilities", "ask"),
    [
        (["generate"], lambda client: client.chat("m", [{"role": "user", "content": "x"}])),
        (["generate", "chat"], lambda client: client.chat("m", IMAGE)),
        (["generate"], lambda client: client.embed("m", ["x"])),
        (["generate"], lambda client: client.count_tokens("m", "x")),
        (["generate"], lambda client: client.score("m", "x", ["y"])),
    ],
)
async def test_what_is_not_announced_is_refused(capabilities: list[str], ask: Any) -> None:
    backend = Told(capabilities=capabilities)
    async with zfabric.testing.serving(backend) as client:
        with pytest.raises(UnsupportedOperationError):
            await ask(client)
    assert backend.asked == []


async def test_images_reach_who_sees() -> None:
    backend = Told(capabilities=["generate", "chat", "multimodal"])
    async with zfabric.testing.serving(backend) as client:
        await client.chat("m", IMAGE)
    assert backend.asked[0].messages == IMAGE


class BothWays(StepwiseModelWorker):
    async def load(self) -> ModelInfo:
        return ModelInfo(name="m")

    def begin(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta()


class BeginsAlone(Told):
    def begin(self, request: GenerateRequest) -> None: ...


@pytest.mark.parametrize(
    ("backend", "announced", "message"),
    [
        (Told(), {"capabilities": ["embed"]}, "override embed"),
        (Told(), {"capabilities": ["generat"]}, "did you mean 'generate'"),
        (Told(), {"parameters": ["temprature"]}, "did you mean 'temperature'"),
        (BothWays(), {}, "whose generate is never called"),
        (BeginsAlone(), {}, "derive it from StepwiseModelWorker"),
    ],
)
def test_what_cannot_be_kept_is_no_announcement(
    backend: BaseModelWorker, announced: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_announcement(backend, ModelInfo(name="m", **announced))
