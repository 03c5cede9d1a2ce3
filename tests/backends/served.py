"""Real servers for the hf-api backend, as processes: `transformers serve`, and vLLM's OpenAI server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def transformers_server(model: Path, home: Path, *arguments: str) -> AsyncIterator[str]:
    """The root of its API, once it answers."""
    (home / "hub").mkdir(exist_ok=True)
    command = ("transformers.cli.transformers", "serve", str(model), "--device", "cpu", "--dtype", "float32")
    async with _server(home / "serve.log", *command, *arguments, HF_HOME=str(home)) as url:
        yield f"{url}/v1"


@contextlib.asynccontextmanager
async def vllm_server(model: Path, home: Path, *arguments: str) -> AsyncIterator[str]:
    """The root of the server, once it answers; its API is in /v1, and it has /metrics."""
    command = ("vllm.entrypoints.openai.api_server", "--model", str(model), "--disable-uvicorn-access-log")
    async with _server(home / "vllm.log", *command, *arguments, VLLM_NO_USAGE_STATS="1") as url:
        yield url


@contextlib.asynccontextmanager
async def _server(log: Path, module: str, *arguments: str, **environment: str) -> AsyncIterator[str]:
    """A server's root, once it says that it is well."""
    port = free_port()
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments, "--host", "127.0.0.1", "--port", str(port),
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(110), httpx2.AsyncClient(trust_env=False) as client:
            while True:
                assert process.returncode is None, log.read_text()
                with contextlib.suppress(httpx2.HTTPError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
        yield url
    finally:
        # With its children: an engine may compute in one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
