"""What the fabric costs in front of an HTTP server: `python -m bench.engines.hf_api` prints one JSON object.

A server process of its own sends tokens on a schedule. The same load goes to it directly (huggingface_hub's
AsyncInferenceClient) and through controller and hf-api worker, in turns, so that whatever else the machine does falls on
both. TTFT is measured on single requests, throughput on all streams at once.
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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from huggingface_hub import AsyncInferenceClient

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


async def _rate(ask: Ask, streams: int, count: int) -> float:
    started = time.perf_counter()
    results = await asyncio.gather(*(ask(count) for _ in range(streams)))
    assert all(seen == count for _, seen in results)
    return streams * count / (time.perf_counter() - started)


async def _measure(direct: Ask, through: Ask, options: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"direct": [], "through": []}
    firsts: dict[str, list[float]] = {"direct": [], "through": []}
    sides = (("direct", direct), ("through", through))
    for _, ask in sides:
        await _rate(ask, options.streams, 4)
    for number in range(options.rounds):
        for name, ask in sides[:: 1 if number % 2 else -1]:
            rates[name].append(await _rate(ask, options.streams, options.tokens))
    for number in range(options.requests):
        for name, ask in sides[:: 1 if number % 2 else -1]:
            firsts[name].append((await ask(2))[0] * 1_000)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    ttft = {name: statistics.median(values) for name, values in firsts.items()}
    return {
        "streams": options.streams,
        "interval_ms": options.interval_ms,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "requests": options.requests,
        "tokens_per_second": {name: round(value, 1) for name, value in rate.items()},
        "tokens_per_second_lost_percent": round(100 * (1 - rate["through"] / rate["direct"]), 2),
        "ttft_p50_ms": {name: round(value, 3) for name, value in ttft.items()},
        "ttft_p50_added_ms": round(ttft["through"] - ttft["direct"], 3),
    }


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
                result = await _measure(
                    lambda count: _direct(hub, count), lambda count: _through(client, count), options
                )
            print(json.dumps(result, indent=2))
        finally:
            for child in reversed(children):
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                await child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--interval-ms", type=float, default=30.0, help="between two tokens of a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60, help="for the time to the first token, of each side")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Set where the environment is meant to be offline, it would keep the hub's client from loopback as well.
    os.environ.pop("HF_HUB_OFFLINE", None)
    asyncio.run(_serve(0, options.interval_ms / 1_000) if options.serve else _run(options))


if __name__ == "__main__":
    main()
