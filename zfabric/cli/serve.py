"""zfabric serve: a controller, a worker and a gateway on one host, started in order and kept going."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Annotated, Final, Literal

import cyclopts
import msgspec

from zfabric import limits
from zfabric.cli.daemon import on_signals, ready, run
from zfabric.cli.logs import LogFormat, LogLevel, events, make_logger
from zfabric.cli.settings import CONFIG_VARIABLE
from zfabric.cli.supervise import Child, Supervisor
from zfabric.client.aio import AsyncClient
from zfabric.errors import ConfigurationError
from zfabric.transport.endpoints import check_endpoint, default_endpoint

_QUESTION: Final = "What is the capital of France?"
#: Of the example's answer at most.
_EXAMPLE_TOKENS: Final = 48


def serve(
    model: str,
    *options: str,
    backend: Literal["transformers", "vllm", "echo"] = "transformers",
    host: str = "127.0.0.1",
    port: int = 8000,
    endpoint: str | None = None,
    api_keys: Path | None = None,
    log_level: LogLevel = "warning",
    log_format: LogFormat = "auto",
    config: Annotated[Path | None, cyclopts.Parameter(env_var=CONFIG_VARIABLE)] = None,
) -> int:
    """Serve a model on this host: a controller, a worker and an OpenAI API over HTTP, until Ctrl-C.

    Examples: `zfabric serve ./SmolLM2-135M-Instruct` · `zfabric serve echo --port 8080` ·
    `zfabric serve Qwen/Qwen3-4B --backend vllm -- --gpu-memory-utilization 0.8`

    Args:
        model: A directory or a name that the backend knows; "echo" needs no files, and says again what it is told.
        options: More flags of zfabric-worker, after --.
        backend: transformers, vllm or echo. Start others by themselves, with zfabric-controller and zfabric-gateway beside.
        host: Where to listen for HTTP.
        port: Where to listen for HTTP; 0 is a free one.
        endpoint: The controller's; $ZFABRIC_ENDPOINT, else this host's default.
        api_keys: TOML file of the keys that may call; without it everybody may who can connect.
        log_level: debug, info, warning or error.
        log_format: console, json, or auto (by terminal).
        config: TOML file, of which the daemons read their own tables.
    """
    place = check_endpoint(endpoint or default_endpoint())
    shared = ["--endpoint", place, "--log-level", log_level, "--log-format", log_format]
    if config is not None:
        shared += ["--config", str(config)]
    kind = "echo" if model == "echo" and backend == "transformers" else backend
    work = ["--backend", kind, *([] if kind == "echo" else ["--model", model]), *options]
    door = ["--host", host, "--port", str(port), *(["--api-keys", str(api_keys)] if api_keys is not None else [])]
    children = [
        Child("controller", "zfabric.cli.controller", shared),
        Child("worker", "zfabric.cli.worker", [*shared, *work]),
        Child("gateway", "zfabric.cli.gateway", [*shared, *door]),
    ]
    return run(_serve(children, place, log_level, log_format), use_uvloop=False)


async def _serve(children: list[Child], endpoint: str, level: LogLevel, form: LogFormat) -> int:
    """Start all, say how to call them, and wait for a signal."""
    log = make_logger("serve", level, form)
    supervisor = Supervisor(events(log), (limits.DRAIN_MS + limits.STOP_MS) / 1_000)
    stopping, stopped = asyncio.Event(), asyncio.Event()

    async def stop() -> None:
        stopping.set()
        await supervisor.stop()
        stopped.set()

    on_signals(stop)
    try:
        told = [await supervisor.add(child) for child in children]
    except ConfigurationError:
        if not stopping.is_set():
            await supervisor.stop()
            raise
    else:
        name = told[1]["models"].partition(",")[0]
        ready(url=f"{told[2]['url']}/v1", models=told[1]["models"])
        example = await _example(endpoint, told[2]["url"], name)
        sys.stdout.write(f"try: {example}\n")
        sys.stdout.flush()
    await stopped.wait()
    return 0


async def _example(endpoint: str, url: str, model: str) -> str:
    """A line for a shell that asks the model for what it can do."""
    async with AsyncClient(endpoint, label="serve") as client:
        able = (await client.model_details(model)).capabilities
    path: str
    value: object
    if "chat" in able:
        path, name, value = "chat/completions", "messages", [{"role": "user", "content": _QUESTION}]
    else:
        path, name, value = (
            ("completions", "prompt", _QUESTION) if "generate" in able else ("embeddings", "input", _QUESTION)
        )
    # A small model may not come to an end by itself.
    limit = {} if path == "embeddings" else {"max_tokens": _EXAMPLE_TOKENS}
    body = msgspec.json.encode({"model": model, name: value, **limit}).decode()
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
