"""What the fabric costs in front of an HTTP server: `python -m bench.engines.hf_api` prints one JSON object.

A server process of its own sends tokens on a schedule. The same load goes to it directly (huggingface_hub's
AsyncInferenceClient) and through controller and hf-api worker, in turns, so that whatever else the machine does falls on
both. With one stream, the time to the first token is that of single requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import AsyncInferenceClient

from bench.engines.runs import Run, results
from zfabric import AsyncClient

Ask = Callable[[int], Awaitable[tuple[float, int]]]
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(event: dict[str, Any] | None) -> bytes:
    data = b"data: " + (json.dumps(event).encode() if event else b"[DONE]") + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


async def _serve(port: int, interval_s: float) -> None:
    """An OpenAI chat server that says one word per interval; the first after 20 intervals."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                count = json.loads(await reader.readexactly(length))["max_tokens"]
                writer.write(_HEAD)
                due = asyncio.get_running_loop().time() + 20 * interval_s
                for number in range(count):
                    await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                    due += interval_s
                    finish = "length" if number == count - 1 else None
                    choice = {"index": 0, "delta": {"role": "assistant", "content": "word "}, "finish_reason": finish}
                    event = {"id": "x", "created": 1, "model": "m", "system_fingerprint": "f", "choices": [choice]}
                    writer.write(_chunk(event))
                usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
                last = {"id": "x", "created": 1, "model": "m", "system_fingerprint": "f", "choices": [], "usage": usage}
                writer.write(_chunk(last) + _chunk(None) + b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _direct(client: AsyncInferenceClient, count: int) -> tuple[float, int]:
    started, first, seen = time.perf_counter(), 0.0, 0
    messages = [{"role": "user", "content": "hi"}]
    options = {"include_usage": True}
    stream = await client.chat_completion(
        messages, model="m", stream=True, max_tokens=count, temperature=1.0, top_p=1.0, stream_options=options
    )
    async for event in stream:
        if event.choices and event.choices[0].delta.content:
            first = first or time.perf_counter() - started
            seen += 1
    return first, seen


async def _through(client: AsyncClient, count: int) -> tuple[float, int]:
    started, first, seen = time.perf_counter(), 0.0, 0
    async for delta in client.stream("m", "hi", max_new_tokens=count):
        if delta.text:
            first = first or time.perf_counter() - started
            seen += len(delta.text.split())
    return first, seen


async def _together(ask: Ask, streams: int, count: int) -> Run:
    """So many answers at once, each to its end."""
    started = time.perf_counter()
    results = await asyncio.gather(*(ask(count) for _ in range(streams)))
    assert all(seen == count for _, seen in results)
    rate = streams * count / (time.perf_counter() - started)
    return Run(rate, statistics.median(first for first, _ in results) * 1_000)


async def _alone(ask: Ask, requests: int, count: int) -> Run:
    """One answer at a time: one to its end, and the first tokens of so many."""
    whole = await _together(ask, 1, count)
    return Run(whole.tokens_per_second, statistics.median([(await ask(2))[0] for _ in range(requests)]) * 1_000)


async def _measure(sides: dict[str, Ask], options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[tuple[str, int], list[Run]] = {}
    for ask in sides.values():
        await _together(ask, max(options.streams), 4)
    for number in range(options.rounds):
        for streams in options.streams:
            for name in sorted(sides, reverse=number % 2 == 0):
                print(f"round {number + 1}, {streams} streams, {name}", file=sys.stderr, flush=True)
                ask, count = sides[name], options.tokens
                alone = streams == 1
                run = await (_alone(ask, options.requests, count) if alone else _together(ask, streams, count))
                runs.setdefault((name, streams), []).append(run)
    return {"settings": vars(options), "results": results(runs), **_costs(runs, options.streams)}


def _costs(runs: dict[tuple[str, int], list[Run]], concurrencies: Sequence[int]) -> dict[str, Any]:
    """What the fabric costs: medians of the rounds' own differences, by streams."""
    lost, added = {}, {}
    for streams in concurrencies:
        pairs = list(zip(runs["fabric", streams], runs["direct", streams], strict=True))
        share = statistics.median(1 - ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs)
        lost[str(streams)] = round(100 * share, 2)
        added[str(streams)] = round(
            statistics.median(ours.ttft_ms_p50 - theirs.ttft_ms_p50 for ours, theirs in pairs), 3
        )
    return {"tokens_per_second_lost_percent": lost, "ttft_p50_added_ms": added}


async def _start(*command: str) -> tuple[asyncio.subprocess.Process, str]:
    """A child, and its first line."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", *command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode()


async def _run(options: argparse.Namespace) -> None:
    children: list[asyncio.subprocess.Process] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            server, line = await _start("bench.engines.hf_api", "--serve", "--interval-ms", str(options.interval_ms))
            children.append(server)
            url = f"http://127.0.0.1:{line.split()[1]}"
            models = Path(directory) / "models.json"
            models.write_text(json.dumps({"models": {"m": {"base_url": f"{url}/v1"}}}))
            endpoint = f"ipc://{directory}/c.sock"
            quiet = ("--endpoint", endpoint, "--log-level", "error")
            children.append((await _start("zfabric.cli.controller", *quiet))[0])
            arguments = ("--backend", "hf-api", "--models", str(models), *quiet)
            children.append((await _start("zfabric.cli.worker", *arguments))[0])
            async with AsyncClient(endpoint) as client, AsyncInferenceClient(base_url=f"{url}/v1") as hub:
                sides: dict[str, Ask] = {
                    "direct": lambda count: _direct(hub, count),
                    "fabric": lambda count: _through(client, count),
                }
                result = await _measure(sides, options)
            print(json.dumps(result, indent=2))
        finally:
            for child in reversed(children):
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                await child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--interval-ms", type=float, default=30.0, help="between two tokens of a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20, help="for the first token of one stream, each round")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Set where the environment is meant to be offline, it would keep the hub's client from loopback as well.
    os.environ.pop("HF_HUB_OFFLINE", None)
    asyncio.run(_serve(0, options.interval_ms / 1_000) if options.serve else _run(options))


if __name__ == "__main__":
    main()
