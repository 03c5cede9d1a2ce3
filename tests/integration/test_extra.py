"""What one engine alone knows passes through the fabric by name, and what no engine knows is refused by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

import pytest

import zfabric.testing
from zfabric import (
    BaseModelWorker,
    Completion,
    Delta,
    GenerateRequest,
    ModelInfo,
    RequestError,
    UnsupportedParameterError,
)
from zfabric.backends.echo import EchoWorker
from zfabric.backends.front import TextModelWorker
from zfabric.wire.extra import COMMON

TOLD = {"fingerprint": "fp-1", "given": {"knob": 3}}


class Knowing(BaseModelWorker):
    """Knows two keys, notes them, and tells of them."""

    extra: ClassVar[Mapping[str, Any] | None] = {"cache_salt": COMMON["cache_salt"], "knob": int}

    async def load(self) -> ModelInfo:
        return ModelInfo(name="m")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta(text="a", token_ids=[1], extra={"fingerprint": "fp-1"})
        yield Delta(text="b", token_ids=[2])
        yield Delta(text="c", token_ids=[3], finish_reason="stop", extra={"given": dict(request.extra)})


class Words(TextModelWorker):
    async def load(self) -> ModelInfo:
        return ModelInfo(name="m")

    async def complete(self, prompt: str, request: GenerateRequest) -> AsyncIterator[str]:
        yield str(sorted(request.extra))


class KnowingWords(Words):
    extra = {"knob": int}


class Anything(Knowing):
    extra = None


async def test_every_way_to_ask_brings_the_same_answer() -> None:
    options: dict[str, Any] = {"extra": {"knob": 3}}
    async with zfabric.testing.serving(Knowing()) as client:
        assert (await client.model_details("m")).extra == ["cache_salt", "knob"]
        found = [await client.generate("m", "x", **options)]
        stream = client.stream("m", "x", **options)
        deltas = [delta async for delta in stream]
        assert {name: value for delta in deltas for name, value in (delta.extra or {}).items()} == TOLD
        assert stream.extra == TOLD
        found.append(await stream.collect())
        async for _, result in client.generate_many("m", ["x", "y"], **options):
            assert isinstance(result, Completion)
            found.append(result)
        async with client.reader() as reader:
            one = reader.stream("m", "x", **options)
            async for _ in reader:
                pass
            found.append(one.completion())
        assert [completion.extra for completion in found] == [TOLD] * len(found)
        assert {completion.text for completion in found} == {"abc"}


def test_a_blocking_client_has_it_too() -> None:
    with zfabric.testing.run_backend(Knowing()) as client:
        assert client.generate("m", "x", extra={"knob": 3}).extra == TOLD
        stream = client.stream("m", "x", extra={"knob": 3})
        assert stream.collect().extra == stream.extra == TOLD


@pytest.mark.parametrize("backend", [EchoWorker(), Words(), Knowing()])
async def test_a_key_that_is_not_known_is_refused_by_name(backend: BaseModelWorker) -> None:
    async with zfabric.testing.serving(backend) as client:
        [info] = await client.models()
        for key in ("include_stop", "colour"):
            with pytest.raises(UnsupportedParameterError, match=f"extra '{key}' is not known to model '{info.name}'"):
                await client.generate(info.name, "x", extra={key: True})


async def test_types_are_those_of_the_class_and_checked_before_it_is_asked() -> None:
    async with zfabric.testing.serving(KnowingWords()) as client:
        assert (await client.generate("m", "x", extra={"knob": 1})).text == "['knob']"
        with pytest.raises(RequestError, match="extra 'knob': expected `int`, got `str`"):
            await client.generate("m", "x", extra={"knob": "three"})


async def test_a_class_may_take_any_key_and_a_model_fewer_than_its_class() -> None:
    async with zfabric.testing.serving(Anything()) as client:
        assert (await client.model_details("m")).extra is None
        assert (await client.generate("m", "x", extra={"colour": [1]})).extra["given"] == {"colour": [1]}
        # What has one meaning everywhere has its type everywhere.
        with pytest.raises(RequestError, match="detokenize"):
            await client.generate("m", "x", extra={"detokenize": "no"})
