"""An engine that hangs, dies or breaks in a real worker process: what its streams, its process and its log make of it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.fabric import Process, processes
from zfabric import AsyncClient

STREAMS = 6
BREAKS_AT_COLUMNS = 60
Served = tuple[AsyncClient, Process, Process]


@pytest_asyncio.fixture
async def served(tiny_llama: Path) -> AsyncIterator[Served]:
    """A client, and two workers, of which the first, w0, can be told to break."""
    with tempfile.TemporaryDirectory(prefix="zf-") as name:
        endpoint = f"ipc://{name}/c.sock"
        async with processes(Path(name)) as children:

            async def start(module: str, *arguments: str) -> Process:
                child = await Process.start(module, "--endpoint", endpoint, *arguments, directory=Path(name))
                children.append(child)
                return child

            await (await start("zfabric.cli.controller")).ready()
            common = ["--model", str(tiny_llama), "--model-names", "tiny", "--dtype", "float32", "--device", "cpu"]
            common += ["--threads", "1", "--stall-ms", "1500", "--log-format", "json"]
            breaking = "tests.backends.breaking:BreakingWorker"
            w0 = await start("zfabric.cli.worker", "--name", "w0", "--backend", breaking, *common)
            w1 = await start("zfabric.cli.worker", "--name", "w1", "--backend", "transformers", *common)
            await w0.ready()
            await w1.ready()
            async with AsyncClient(endpoint) as client:
                yield client, w0, w1


async def streamed(client: AsyncClient, number: int) -> tuple[str, bool]:
    """The text of a stream, and whether it began at w0 and ended elsewhere."""
    stream = client.stream("tiny", f"Once upon {number}", temperature=0, max_new_tokens=150, ignore_eos=True)
    workers = [stream.worker async for _ in stream]
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 150
    return stream.text, workers[0] == "w0" != workers[-1]


async def broken_streams(client: AsyncClient, how: str) -> None:
    """Have w0 break under streams; all of them say what they say undisturbed."""
    undisturbed = [(await streamed(client, number))[0] for number in range(STREAMS)]
    await client.operate("w0", "break_at", columns=BREAKS_AT_COLUMNS, how=how)
    broken = await asyncio.gather(*(streamed(client, number) for number in range(STREAMS)))
    assert [text for text, _ in broken] == undisturbed
    assert any(moved for _, moved in broken) or how == "break"


@pytest.mark.parametrize(("how", "says"), [("hang", "made no step"), ("die", "thread died: SystemExit")])
async def test_an_engine_that_is_gone_ends_its_worker_and_no_stream(served: Served, how: str, says: str) -> None:
    client, w0, w1 = served
    await broken_streams(client, how)
    assert await w0.ended() != 0
    log = w0.log.read_text()
    assert '"engine_died"' in log
    assert says in log
    assert w1.process.returncode is None
    assert (await client.generate("tiny", "Hello", max_new_tokens=3)).worker == "w1"


async def test_an_engine_that_broke_goes_on_in_its_process(served: Served) -> None:
    client, w0, w1 = served
    await broken_streams(client, "break")
    w1.kill()
    await w1.ended()
    assert (await client.generate("tiny", "Hello", max_new_tokens=3)).worker == "w0"
    assert w0.process.returncode is None
    log = w0.log.read_text()
    assert '"engine_restarted"' in log
    assert "ValueError: broken" in log
    assert '"engine_died"' not in log
