"""zfabric serve: a controller, a worker and a gateway on one host, started in order and kept going."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Final, Literal

import cyclopts
import msgspec

from zfabric.cli.daemon import ready, run
from zfabric.cli.fleet import Plan
from zfabric.cli.fleet_run import Told, run_fleet
from zfabric.cli.logs import LogFormat, LogLevel, events, make_logger
from zfabric.cli.settings import CONFIG_VARIABLE
from zfabric.client.aio import AsyncClient
from zfabric.fleet.config import Common, Fleet, Group

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
    kind = "echo" if model == "echo" and backend == "transformers" else backend
    work = {"backend": kind, **({} if kind == "echo" else {"model": model})}
    door = {"host": host, "port": port, **({} if api_keys is None else {"api_keys": str(api_keys)})}
    common = Common(
        endpoint=endpoint, config=None if config is None else str(config), log_level=log_level, log_format=log_format
    )
    workers = {"worker": Group(settings=work, arguments=options)}
    plan = Plan(Fleet(fleet=common, controller={}, gateway=door, workers=workers), Path(), prefixed=False)
    return run(_serve(plan, log_level, log_format), use_uvloop=False)


async def _serve(plan: Plan, level: LogLevel, form: LogFormat) -> int:
    """Start all, say how to call them, and wait for a signal."""

    async def on_ready(told: Told) -> None:
        url, models = told["gateway"]["url"], told["worker-1"]["models"]
        ready(url=f"{url}/v1", models=models)
        sys.stdout.write(f"try: {await _example(plan.endpoint, url, models.partition(',')[0])}\n")
        sys.stdout.flush()

    return await run_fleet(plan, events(make_logger("serve", level, form)), on_ready)


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
