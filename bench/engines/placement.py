"""Which router finds what is cached: two vLLM engines with prefix caches, behind zfabric's policies and the routers' own.

Usage: python -m bench.engines.placement [--trace mooncake.jsonl] [--rounds 3] [--output FILE]

A trace of chats, or one with `hash_ids`, is replayed as it comes, shrunk so that two small engines are busy with it: each of
its blocks is eight words that are drawn by its hash, so prompts share what the trace says, and answers are shorter. All send
text to the same two engines (`bench.engines.vllm_shared`): zfabric by two workers and a client that hashes its prompts, the
routers by two of vLLM's own servers and an HTTP client. Each run has words of its own, so that nobody finds what another had
computed. Hit rates are those that the engines tell with each answer. Medians of rounds, in which the systems take turns; prints
one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.engines.vllm import ENVIRONMENT, NAME, engine_arguments, free_port, model_directory, process
from bench.engines.vllm_shared import shared_engine
from bench.placement import Cluster, Trace, Turn, conversations, one_cache, read
from bench.runner import percentile
from bench.venvs import python_of
from zfabric import AsyncClient

ENGINES = 2
#: Of seven letters each, and a token: eight of them with their spaces are a block as `zfabric.wire.prefixes` hashes texts by.
_WORDS = (
    "between", "because", "nothing", "through", "without", "another", "against", "thought", "company", "problem",
    "program", "service", "general", "history", "student", "country", "morning", "society", "million", "control",
    "example", "special", "picture", "present", "certain", "science", "support", "process",
)  # fmt: skip
#: Words of a block: a system prompt of the chats has 512.
_BLOCK_WORDS = 8
#: Blocks of each engine's cache and their tokens.
_CACHE_BLOCKS, _CACHE_UNIT = 448, 32
#: An answer has so many times fewer tokens than the trace's.
_SHORTER = 16
_POLICIES = ("round_robin", "shortest_queue", "sticky_least_loaded", "prefix_aware")
_ROUTERS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "vllm-router": lambda python: (str(python.parent / "vllm-router"),),
    "smg": lambda python: (str(python.parent / "smg"), "launch"),
}


class Answered(NamedTuple):
    """One request: when its first token came after it was due, in seconds, its prompt, what of it was cached, and its answer."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    tokens: int


#: Sends a prompt of a chat for so many tokens.
Send = Callable[[str, int, int], Any]


class Words:
    """What blocks say in one run."""

    def __init__(self, seed: str) -> None:
        self._seed = seed

    def prompt(self, blocks: Any) -> str:
        return "".join(self._block(block) for block in blocks)

    def _block(self, block: int) -> str:
        rng = random.Random(f"{self._seed} {block}")
        return "".join(f"{word} " for word in rng.choices(_WORDS, k=_BLOCK_WORDS))


async def replay(trace: Trace, words: Words, speed: float, send: Send) -> tuple[list[Answered], float]:
    """All requests of a trace when they are due, so many times as fast. Returns them, and how many seconds all took."""
    begun = time.perf_counter()

    async def one(turn: Turn) -> Answered:
        due = begun + turn.at_s / speed
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        answer: Answered = await send(words.prompt(turn.blocks), max(1, turn.answer_tokens // _SHORTER), turn.chat)
        return answer._replace(ttft_s=answer.ttft_s - due)

    answers = await asyncio.gather(*(one(turn) for turn in trace.turns))
    return answers, time.perf_counter() - begun


# ── systems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def fabric(engine: list[str], places: list[dict[str, Any]], directory: Path) -> AsyncIterator[AsyncClient]:
    """A controller and a worker for each engine."""
    endpoint = f"ipc://{directory}/fabric.sock"
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(process("zfabric.cli.controller", "--endpoint", endpoint, ready=b"ready"))
        for number, place in enumerate(places):
            worker = (
                "zfabric.cli.worker", "--endpoint", endpoint, "--backend", "vllm", "--name", f"w{number}",
                "--model-names", NAME, *engine,
            )  # fmt: skip
            await stack.enter_async_context(
                process("bench.engines.vllm_shared", json.dumps(place), *worker, ready=b"ready")
            )
        yield await stack.enter_async_context(AsyncClient(endpoint))


async def through_fabric(client: AsyncClient, prompt: str, tokens: int, chat: int) -> Answered:
    first = 0.0
    stream = client.stream(
        NAME, prompt, max_new_tokens=tokens, temperature=0, ignore_eos=True, prefix_hints=True,
        affinity=str(chat) if chat else "",
    )  # fmt: skip
    async for _ in stream:
        first = first or time.perf_counter()
    usage = stream.usage
    assert usage is not None
    return Answered(first, usage.prompt_tokens, usage.cached_tokens or 0, usage.completion_tokens)


@contextlib.asynccontextmanager
async def servers(engine: list[str], places: list[dict[str, Any]]) -> AsyncIterator[list[str]]:
    """vLLM's own server before each engine. Yields their URLs."""
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for place in places:
            port = free_port()
            server = process(
                "bench.engines.vllm_shared", json.dumps(place), "vllm.entrypoints.openai.api_server", "--host",
                "127.0.0.1", "--port", str(port), "--served-model-name", NAME, "--disable-log-stats",
                "--disable-uvicorn-access-log", "--enable-prompt-tokens-details", *engine, ready=None,
            )  # fmt: skip
            await stack.enter_async_context(server)
            urls.append(f"http://127.0.0.1:{port}")
        for url in urls:
            await until_well(f"{url}/health")
        yield urls


@contextlib.asynccontextmanager
async def router(program: tuple[str, ...], urls: list[str]) -> AsyncIterator[str]:
    """One of the routers, with its policy that looks for cached prefixes."""
    port = free_port()
    command = (
        *program, "--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware",
        "--log-level", "error", "--prometheus-port", str(free_port()),
    )  # fmt: skip
    child = await asyncio.create_subprocess_exec(*command, stdout=sys.stderr)
    try:
        await until_well(f"http://127.0.0.1:{port}/v1/models")
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        await child.wait()


async def until_well(url: str) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as session, asyncio.timeout(180):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)


async def through_http(session: Any, url: str, prompt: str, tokens: int, chat: int) -> Answered:
    body = {
        "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    first, usage = 0.0, None
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["choices"]:
                    first = first or time.perf_counter()
                usage = event.get("usage") or usage
    assert usage is not None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answered(first, usage["prompt_tokens"], cached, usage["completion_tokens"])


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def compare(arguments: argparse.Namespace, trace: Trace, model: Path) -> dict[str, list[dict[str, float]]]:
    """By system, what each round measured."""
    import aiohttp

    engine = [
        "--model", str(model), "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32",
        "--enforce-eager", "--distributed-executor-backend", "uni", "--enable-prefix-caching", "--block-size",
        str(_CACHE_UNIT), "--num-gpu-blocks-override", str(_CACHE_BLOCKS),
    ]  # fmt: skip
    rounds: dict[str, list[dict[str, float]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        places: list[list[dict[str, Any]]] = []
        for number in range(ENGINES):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zf-")))
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(number % (os.cpu_count() or 1))
            places.append(stack.enter_context(shared_engine(engine_arguments(engine), directory, 2)))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zf-")))
        client = await stack.enter_async_context(fabric(engine, [place[0] for place in places], directory))
        urls = await stack.enter_async_context(servers(engine, [place[1] for place in places]))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None))
        )
        systems: dict[str, Send] = {f"zfabric {policy}": partial(through_fabric, client) for policy in _POLICIES}
        for name, program in _ROUTERS.items():
            url = await stack.enter_async_context(router(program(python_of("http")), urls))
            systems[name] = partial(through_http, session, url)
        order = list(systems)
        for number in range(arguments.rounds):
            for name in order:
                if name.startswith("zfabric "):
                    await client.change_setting("policy", name.removeprefix("zfabric "))
                answers, seconds = await replay(trace, Words(f"{number} {name}"), arguments.speed, systems[name])
                rounds.setdefault(name, []).append(figures(answers, seconds))
                print(f"round {number + 1}, {name}: {rounds[name][-1]}", file=sys.stderr, flush=True)
            order.append(order.pop(0))
    return rounds


def figures(answers: list[Answered], seconds: float) -> dict[str, float]:
    """Of one run."""
    firsts = sorted(answer.ttft_s for answer in answers)
    return {
        "hit_rate": sum(answer.cached_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers),
        "ttft_p50_s": percentile(firsts, 50),
        "ttft_p99_s": percentile(firsts, 99),
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
    }


def report(trace: Trace, rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, each with the least and the most; and what one cache as large as all would have."""
    oracle = one_cache(Trace(trace.turns, _BLOCK_WORDS), Cluster(ENGINES, _CACHE_BLOCKS * _CACHE_UNIT))
    return {
        "one_cache_hit_rate": round(oracle, 4),
        "requests": len(trace.turns),
        "systems": {
            name: {
                figure: [
                    round(value, 4)
                    for value in (
                        statistics.median(run[figure] for run in runs),
                        min(run[figure] for run in runs),
                        max(run[figure] for run in runs),
                    )
                ]
                for figure in runs[0]
            }
            for name, runs in rounds.items()
        },
    }


def shrunk(trace: Trace, requests: int) -> Trace:
    """The first so many requests."""
    return Trace(trace.turns[:requests], trace.block_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="With hash_ids, as Mooncake's; chats of several turns without it.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--speed", type=float, default=1.0, help="So many times as fast as the trace.")
    parser.add_argument("--output", type=Path, help="Where the JSON goes; standard output without it.")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if find_spec("vllm") is None:
        print("vllm is not installed", file=sys.stderr)
        return 2
    import uvloop

    load = os.getloadavg()[0]
    trace = read(arguments.trace) if arguments.trace else conversations(40, rate=0.5, think_s=5.0)
    trace = shrunk(trace, arguments.requests)
    with tempfile.TemporaryDirectory() as scratch:
        rounds = uvloop.run(compare(arguments, trace, model_directory(arguments.model, Path(scratch))))
    result = {"load_before": load, "load_after": os.getloadavg()[0], **report(trace, rounds)}
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
