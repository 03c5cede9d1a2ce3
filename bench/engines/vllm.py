"""vLLM four ways: through the fabric, through the fabric and its gateway, as a bare AsyncLLM in the caller's process, and behind
its own OpenAI server.

Usage: python -m bench.engines.vllm [--model tiny|smollm2|DIRECTORY] [--streams 1 8 64] [--rounds 5] …

The first token of a stream is the first that has a text: of one without, some servers send an event and others do not.

All share one engine, see `bench.engines.vllm_shared`, and are measured in turns, so that whatever else the machine
does hits all of them. The engine computes in one thread, pinned to the first core; with --pin everything else is kept off
that core. Prints one JSON object: medians over the rounds; and, by driver of the wire, how soon the workers answer while they
compute, see `bench.engines.answers`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.engines.answers import WORKER, in_turn
from bench.engines.runs import Run, results
from bench.engines.vllm_shared import shared_engine
from zfabric import AsyncClient
from zfabric.transport.links import TRANSPORTS, Transport, choose

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
NAME = WORKER
ANSWER_TOKENS = 300


async def measure(stream: Any, streams: int, prompt_tokens: int, new_tokens: int, chance: random.Random) -> Run:
    """So many streams at once, each to its end."""
    prompts = [[chance.randrange(10, 250) for _ in range(prompt_tokens)] for _ in range(streams)]
    begun = time.perf_counter()
    firsts = await asyncio.gather(*(stream(prompt, new_tokens) for prompt in prompts))
    elapsed = time.perf_counter() - begun
    return Run(streams * new_tokens / elapsed, statistics.median(first - begun for first in firsts) * 1_000)


@contextlib.asynccontextmanager
async def fabric(
    engine: list[str],
    place: dict[str, Any],
    directory: Path,
    transport: Transport,
    clients: dict[Transport, AsyncClient],
) -> AsyncIterator[Any]:
    """Controller and worker as processes, on one driver; the client is here, and noted in `clients`."""
    endpoint = f"ipc://{directory}/{transport}.sock"
    common = ("--endpoint", endpoint, "--transport", transport)
    async with (
        process("zfabric.cli.controller", *common, ready=b"ready"),
        process(
            "bench.engines.vllm_shared",
            json.dumps(place),
            "zfabric.cli.worker",
            *common,
            "--backend",
            "vllm",
            "--name",
            NAME,
            "--model-names",
            NAME,
            *engine,
            ready=b"ready",
        ),
        AsyncClient(endpoint, transport=transport) as client,
    ):
        clients[transport] = client

        async def stream(prompt: list[int], new_tokens: int) -> float:
            first, seen = 0.0, 0
            async for delta in client.stream(
                NAME, prompt_token_ids=prompt, max_new_tokens=new_tokens, temperature=0, ignore_eos=True
            ):
                first = first or (time.perf_counter() if delta.text else 0.0)
                seen += len(delta.token_ids)
            assert seen == new_tokens
            return first

        yield stream


@contextlib.asynccontextmanager
async def bare(engine: list[str], place: dict[str, Any] | None, directory: Path) -> AsyncIterator[Any]:
    """The engine, read as vLLM's documentation does it: the one at `place`, or one of its own."""
    place = place or {"addresses": None, "count": 1, "index": 0}
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    running = AsyncLLM.from_vllm_config(
        engine_arguments(engine).create_engine_config(), disable_log_stats=True, client_addresses=place["addresses"],
        client_count=place["count"], client_index=place["index"],
    )  # fmt: skip
    number = 0

    async def stream(prompt: list[int], new_tokens: int) -> float:
        nonlocal number
        number += 1
        sampling = SamplingParams(
            max_tokens=new_tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        first, seen = 0.0, 0
        async for output in running.generate(tokens_input(prompt), sampling, str(number)):
            first = first or (time.perf_counter() if output.outputs[0].text else 0.0)
            seen += len(output.outputs[0].token_ids)
        assert seen == new_tokens
        return first

    try:
        yield stream
    finally:
        await asyncio.to_thread(running.shutdown)


def engine_arguments(engine: list[str]) -> Any:
    """vLLM's `AsyncEngineArgs` of a command line."""
    from vllm import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.from_cli_args(AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(engine))


@contextlib.asynccontextmanager
async def openai(engine: list[str], place: dict[str, Any], directory: Path) -> AsyncIterator[Any]:
    """vLLM's own server on loopback, and a streaming HTTP client here."""
    port = free_port()
    server = process(
        "bench.engines.vllm_shared", json.dumps(place), "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", NAME, "--disable-log-stats", "--disable-uvicorn-access-log", *engine,
        ready=None,
    )  # fmt: skip
    async with server, over_http(port) as stream:
        yield stream


@contextlib.asynccontextmanager
async def gateway(
    engine: list[str], place: dict[str, Any], directory: Path, transport: Transport
) -> AsyncIterator[Any]:
    """A fabric of its own with a gateway before it, and the same HTTP client."""
    port, inside = free_port(), directory / "gateway"
    inside.mkdir(mode=0o700)
    door = ("--endpoint", f"ipc://{inside}/{transport}.sock", "--transport", transport, "--port", str(port))
    async with (
        fabric(engine, place, inside, transport, {}),
        process("zfabric.cli.gateway", *door, ready=b"ready"),
        over_http(port) as stream,
    ):
        yield stream


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.asynccontextmanager
async def over_http(port: int) -> AsyncIterator[Any]:
    """A streaming client of OpenAI's API on loopback, once the server is well."""
    import aiohttp

    base = f"http://127.0.0.1:{port}"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:

        async def stream(prompt: list[int], new_tokens: int) -> float:
            first = 0.0
            body = {
                "model": NAME, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            completion_tokens = 0
            async with session.post(f"{base}/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if any(choice["text"] for choice in event["choices"]):
                        first = first or time.perf_counter()
                    if event.get("usage"):
                        completion_tokens = event["usage"]["completion_tokens"]
            assert completion_tokens == new_tokens
            return first

        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get(f"{base}/health") as response:
                    if response.status == 200:
                        break
            await asyncio.sleep(0.5)
        yield stream


@contextlib.asynccontextmanager
async def process(module: str, *arguments: str, ready: bytes | None) -> AsyncIterator[None]:
    """`python -m module arguments` until the end of the block; waits for its first line where one is expected."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdout=asyncio.subprocess.PIPE if ready else sys.stderr
    )
    try:
        if ready is not None:
            assert child.stdout is not None
            line = await child.stdout.readline()
            assert line.startswith(ready), line
        yield
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGTERM)
            await child.wait()


async def compare(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """All systems, all concurrencies, in turns."""
    engine = [
        "--model", str(model), "--dtype", arguments.dtype, "--max-model-len", "512", "--max-num-seqs", "64",
        "--enforce-eager", "--distributed-executor-backend", "uni", "--no-enable-prefix-caching",
    ]  # fmt: skip
    first, *others = arguments.transport
    makers: dict[str, Callable[..., contextlib.AbstractAsyncContextManager[Any]]]
    clients: dict[Transport, AsyncClient] = {}
    through = partial(fabric, clients=clients)
    makers = {"fabric": partial(through, transport=first), "bare": bare, "openai": openai}
    makers["gateway"] = partial(gateway, transport=first)
    makers |= {f"fabric {transport}": partial(through, transport=transport) for transport in others}
    runs: dict[tuple[str, int], list[Run]] = {}
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zf-")))
        places = stack.enter_context(shared_engine(engine_arguments(engine), directory, len(makers)))
        systems = {
            name: await stack.enter_async_context(make(engine, place, directory))
            for (name, make), place in zip(makers.items(), places, strict=True)
        }
        order = list(systems)
        for number in range(arguments.rounds + 1):
            for streams in arguments.streams:
                for name in order:
                    word = f"round {number}" if number else "warm-up"
                    # All systems have the same prompts: random ones begin their answers with a token without text here and there.
                    chance = random.Random(f"{number} {streams}")
                    run = await measure(systems[name], streams, arguments.prompt_tokens, arguments.new_tokens, chance)
                    # A run that is cut off has told what it measured.
                    speed = f"{run.tokens_per_second:.1f} tokens/s, first token after {run.ttft_ms_p50:.2f} ms"
                    print(f"{word}, {streams} streams, {name}: {speed}", file=sys.stderr, flush=True)
                    # The first round warms up connections, kernels and allocators.
                    if number:
                        runs.setdefault((name, streams), []).append(run)
            order.append(order.pop(0))
        rounds = arguments.answer_rounds
        told = await in_turn(clients, rounds, ANSWER_TOKENS, prompt_of, long_tokens=480, probed=False) if rounds else {}
    return {**report(arguments, runs), "answers_ms": told}


def prompt_of(seed: int, length: int) -> list[int]:
    """Random tokens, the same for the same seed."""
    chance = random.Random(seed)
    return [chance.randrange(10, 250) for _ in range(length)]


def report(arguments: argparse.Namespace, runs: dict[tuple[str, int], list[Run]]) -> dict[str, Any]:
    """Medians, and what the fabric is in relation to the others: the median of the rounds' own ratios."""
    import vllm

    ratios = {
        f"{ours}/{other} at {streams}": {
            "tokens_per_second": round(_ratio(runs, ours, other, streams, "tokens_per_second"), 3),
            "ttft": round(_ratio(runs, ours, other, streams, "ttft_ms_p50"), 3),
        }
        for streams in arguments.streams
        for ours, other in (("fabric", "bare"), ("fabric", "openai"), ("gateway", "openai"))
    }
    conditions = {
        "cores": os.cpu_count(),
        "load_after": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "vllm": vllm.__version__,
        "load_before": arguments.load,
    }
    return {"conditions": conditions, "settings": vars(arguments), "results": results(runs), "ratios": ratios}


def _ratio(runs: dict[tuple[str, int], list[Run]], ours: str, other: str, streams: int, figure: str) -> float:
    pairs = zip(runs[ours, streams], runs[other, streams], strict=True)
    return float(statistics.median(getattr(one, figure) / getattr(theirs, figure) for one, theirs in pairs))


def model_directory(name: str, scratch: Path) -> Path:
    """A directory, the real SmolLM2, or a tiny Llama made on the spot."""
    if name == "tiny":
        from tests.backends.tiny import save_llama

        return save_llama(scratch, heads=2)
    if name == "smollm2":
        from zfabric.models.wheels import prepare

        return prepare("smollm2")
    return Path(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer-rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--transport", nargs="+", choices=TRANSPORTS, default=[choose(None)])
    arguments = parser.parse_args()
    arguments.load = os.getloadavg()[0]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cores = sorted(os.sched_getaffinity(0))
    if arguments.pin and len(cores) > 1:
        os.sched_setaffinity(0, cores[1:])
    if find_spec("vllm") is None:
        print("vllm is not installed", file=sys.stderr)
        return 2
    import uvloop

    with tempfile.TemporaryDirectory() as scratch:
        model = model_directory(arguments.model, Path(scratch))
        result = uvloop.run(compare(arguments, model))
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
