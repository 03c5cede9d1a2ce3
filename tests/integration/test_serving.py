"""What authors of backends use to try them: a fabric in the test's own process, in three lines."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import zfabric.testing
from zfabric import BaseModelWorker, Delta, GenerateRequest, ModelInfo
from zfabric.backends.echo import EchoWorker
from zfabric.errors import UnsupportedOperationError, UnsupportedParameterError

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def readme_code(marker: str) -> str:
    """The block of the README that holds this: what people copy is what is tested."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if marker in block)


def reverser() -> BaseModelWorker:
    """The README's backend, from the README."""
    names: dict[str, Any] = {}
    exec(readme_code("class Reverser"), names)
    made: BaseModelWorker = names["Reverser"]()
    return made


async def test_the_readme_s_backend_does_what_its_reader_tries() -> None:
    async with zfabric.testing.serving(reverser()) as client:
        assert (await client.generate("reverser", "one two three")).text == "three two one "
        assert (await client.generate("reverser", "one two three", temperature=0)).text == "three two one "
        assert (await client.generate("reverser", "one two", seed=7)).finish_reason == "stop"
        short = await client.generate("reverser", "one two three", max_new_tokens=2)
        assert (short.text, short.finish_reason, short.usage.completion_tokens) == ("three two ", "length", 2)
        whole = await client.generate("reverser", "one two", max_new_tokens=None)
        assert (whole.text, whole.finish_reason) == ("two one ", "stop")
        chat = await client.generate("reverser", messages=[{"role": "user", "content": "hello there"}])
        assert chat.text == "there hello "
        parts: list[Any] = [{"type": "text", "text": "from parts"}]
        assert (await client.generate("reverser", messages=[{"role": "user", "content": parts}])).text == "parts from "
        seen = [*parts, {"type": "image", "image": b"x"}]
        with pytest.raises(UnsupportedOperationError, match="part of type 'image'"):
            await client.generate("reverser", messages=[{"role": "user", "content": seen}])
        with pytest.raises(UnsupportedOperationError, match="does not support embed"):
            await client.embed("reverser", ["one"])
        assert (await client.generate("reverser", "   ")).text == ""
        with pytest.raises(UnsupportedParameterError, match="top_k"):
            await client.generate("reverser", "one", top_k=3)
        with pytest.raises(UnsupportedOperationError, match="token ids"):
            await client.generate("reverser", prompt_token_ids=[1, 2])


async def test_the_readme_s_test_passes() -> None:
    names: dict[str, Any] = {"zfabric": zfabric, "Reverser": reverser}
    exec(readme_code("test_reverser"), names)
    await names["test_reverser"]()


def test_a_backend_runs_for_tests_that_block() -> None:
    before = threading.active_count()
    with zfabric.testing.run_backend(reverser(), EchoWorker(), slots=2) as client:
        assert client.generate("reverser", "one two").text == "two one "
        assert client.generate("echo", "a b", max_new_tokens=3).text == "a b a "
        assert client.workers()[0].slots == 2
    assert threading.active_count() == before


class Closing(BaseModelWorker):
    """Never ends by itself, and notes what it hears."""

    def __init__(self, *, loads: bool = True) -> None:
        self.loads = loads
        self.closed = 0
        self.stopped = 0

    async def load(self) -> ModelInfo:
        if not self.loads:
            raise OSError("no weights here")
        return ModelInfo(name="closing", capabilities=["generate"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        try:
            while True:
                yield Delta(text="x", token_ids=[1])
                await asyncio.sleep(0.001)
        finally:
            self.stopped += 1

    async def close(self) -> None:
        self.closed += 1


async def test_nothing_is_left_of_it_whatever_the_test_does() -> None:
    backend = Closing()

    async def failing() -> None:
        async with zfabric.testing.serving(backend) as client:
            await anext(client.stream("closing", "x"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing()
    assert (backend.stopped, backend.closed) == (1, 1)
    backend = Closing()
    async with zfabric.testing.serving(backend) as client:
        await anext(client.stream("closing", "x"))
    assert (backend.stopped, backend.closed) == (1, 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_backend_that_does_not_load_says_why() -> None:
    backend = Closing(loads=False)
    with pytest.raises(OSError, match="no weights"):
        async with zfabric.testing.serving(backend):
            raise AssertionError
    assert backend.closed == 1


def test_a_backend_that_does_not_load_says_why_to_who_blocks() -> None:
    with pytest.raises(OSError, match="no weights"), zfabric.testing.run_backend(Closing(loads=False)):
        raise AssertionError
