"""`transformers serve` as a process: a real server for the hf-api backend."""

from __future__ import annotations

import asyncio
import contextlib
import os
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
    port = free_port()
    log = home / "serve.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "transformers.cli.transformers", "serve", str(model),
            "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32", *arguments,
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        async with asyncio.timeout(90), httpx2.AsyncClient(trust_env=False) as client:
            while True:
                assert process.returncode is None, log.read_text()
                with contextlib.suppress(httpx2.HTTPError):
                    if (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
