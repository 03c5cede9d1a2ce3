"""Real engines: through the fabric, alone, and behind their usual HTTP server. Each where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from typing import Any

from bench.record import Report, Table
from bench.runner import Bench, ratios
from bench.stack import ROOT

NAME = "engines"
TITLE = "Engines: real models through the fabric"
#: Module that measures → what has to be installed, and its arguments.
ENGINES = {
    "transformers": (("torch", "transformers"), ["--models", "tiny", "smollm2"]),
    "vllm": (("torch", "vllm", "aiohttp"), ["--model", "smollm2", "--rounds", "3", "--new-tokens", "32"]),
    "hf_api": (("httpx2", "huggingface_hub"), ["--rounds", "3", "--tokens", "60", "--interval-ms", "20"]),
}
_LIMIT_S = 400
_GAPS = {"gaps_ms": ("undisturbed", "disturbed"), "answers_ms": ("step_handed_over",)}
_ANSWERS = {"fabric_ms": ("status_idle", "status", "cancel", "worker_timers")}


async def run(bench: Bench, report: Report) -> None:
    """A process an engine: what one leaves behind must not be measured with the next. Not part of a quick run."""
    if bench.quick:
        report.skipped.append("real engines take minutes to load: they are part of the full run alone")
        return
    for name, (modules, arguments) in ENGINES.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            report.skipped.append(f"{name}: {', '.join(missing)} is not installed (make test installs all engines)")
            continue
        try:
            document = await _measured(bench, name, arguments)
        except (RuntimeError, TimeoutError) as error:
            report.skipped.append(f"{name}: {error or f'took more than {_LIMIT_S} s'}")
            continue
        tell(report, name, document)


def tell(report: Report, name: str, document: dict[str, Any]) -> None:
    """Add what an engine's module printed: tables, and metrics with their goals."""
    if name != "transformers":
        found = _throughput(report, name, document["results"])
    if name == "vllm":
        for streams in sorted({streams for _, streams in found}):
            ours, alone, server = (found[system, streams] for system in ("fabric", "bare", "openai"))
            key, reference = f"vllm.tokens_at_{streams}_to", "vLLM's OpenAI server"
            told = ratios(ours["runs"], alone["runs"])
            report.metric(f"{key}_bare", told, "×", "higher", goal=0.97, reference="bare AsyncLLM")
            report.metric(f"{key}_server", ratios(ours["runs"], server["runs"]), "×", "higher", reference=reference)
            told = ratios(ours["ttft_ms_runs"], server["ttft_ms_runs"])
            report.metric(f"vllm.ttft_at_{streams}_to_server", told, "×", "lower", reference=reference)
            door = found["gateway", streams]
            told = ratios(door["runs"], server["runs"])
            key = f"vllm.gateway_tokens_at_{streams}_to_server"
            report.metric(key, told, "×", "higher", goal=1.0, reference=reference)
            told = ratios(door["ttft_ms_runs"], server["ttft_ms_runs"])
            key = f"vllm.gateway_ttft_at_{streams}_to_server"
            report.metric(key, told, "×", "lower", goal=1.0, reference=reference)
    elif name == "hf_api":
        reference = "AsyncInferenceClient alone"
        for streams in sorted({streams for _, streams in found}):
            ours, alone = found["fabric", streams], found["direct", streams]
            lost = [100 * (1 - ratio) for ratio in ratios(ours["runs"], alone["runs"])]
            key = f"hf_api.tokens_lost_at_{streams}"
            report.metric(key, lost, "%", "lower", goal=5, reference=reference)
        pairs = zip(found["fabric", 1]["ttft_ms_runs"], found["direct", 1]["ttft_ms_runs"], strict=True)
        added = [ours - alone for ours, alone in pairs]
        report.metric("hf_api.ttft_added_ms", added, "ms", "lower", goal=1, reference=reference)
    else:
        for model, figures in document["models"].items():
            _transformers(report, f"transformers.{model}", figures)
        report.unequal.append("transformers: the worker alone is in the process that asks: no other one needs a core.")


def _throughput(report: Report, title: str, results: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """A table of all systems, and the entries by system and streams."""
    columns = ["streams", "system", "tokens/s", "first token p50 ms"]
    rows = [
        [str(found["streams"]), found["system"], f"{found['tokens_per_second']:,.1f}", f"{found['ttft_ms_p50']:,.2f}"]
        for found in results
    ]
    report.tables.append(Table(f"{title}: tokens/s and first tokens", columns, rows))
    return {(found["system"], found["streams"]): found for found in results}


def _transformers(report: Report, title: str, figures: dict[str, Any]) -> None:
    """One model's."""
    found, rates = _throughput(report, title, figures["results"]), figures["throughput"]
    rows = [[name.removesuffix("_tokens_per_s"), f"{rate:,.1f}"] for name, rate in rates.items() if "_per_s" in name]
    report.tables.append(Table(f"{title}: beside other ways to run it", ["system", "tokens/s"], rows))
    for what, kinds in (("gaps between tokens", _GAPS), ("answers of a worker that computes", _ANSWERS)):
        rows = [
            [kind, *(f"{figures[part][kind][at]:,.2f}" for at in ("p50", "p99", "max"))]
            for part, names in kinds.items()
            for kind in names
        ]
        report.tables.append(Table(f"{title}: {what}, ms", ["", "p50", "p99", "max"], rows))
    reference = "generate, one by one"
    gains = rates["gain_at_8_rounds"]
    report.metric(f"{title}.gain_at_8", gains, "×", "higher", goal=4, reference=reference)
    for streams in sorted({streams for _, streams in found}):
        told = ratios(found["fabric", streams]["runs"], found["worker", streams]["runs"])
        key = f"{title}.tokens_at_{streams}_to_alone"
        report.metric(key, told, "×", "higher", reference="the worker without a fabric")
    for kind in ("status", "cancel"):
        report.metric(f"{title}.{kind}_p99_ms", [figures["fabric_ms"][kind]["p99"]], "ms", "lower")
    for kind in _GAPS["gaps_ms"]:
        report.metric(f"{title}.gap_{kind}_p99_ms", [figures["gaps_ms"][kind]["p99"]], "ms", "lower")


async def _measured(bench: Bench, name: str, arguments: list[str]) -> dict[str, Any]:
    """What the engine's module prints; each line of its other output is said as progress.

    Raises:
        RuntimeError: With its last line, if it failed.
        TimeoutError: If it took too long.
    """
    bench.say(f"{name}: loading")
    command = [sys.executable, "-m", f"bench.engines.{name}", *arguments]
    options: dict[str, Any] = {"cwd": ROOT, "limit": 1 << 20, "start_new_session": True}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, **options)
    assert process.stdout is not None
    assert process.stderr is not None
    last = ""
    try:
        async with asyncio.timeout(_LIMIT_S):
            output = asyncio.ensure_future(process.stdout.read())
            async for line in process.stderr:
                last = line.decode(errors="replace").strip()[:200] or last
                bench.say(f"{name}: {last}")
            document = await output
            await process.wait()
    finally:
        # Its children as well, where it had no time to end them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if not document:
        raise RuntimeError(f"ended with {process.returncode}: {last}")
    found: dict[str, Any] = json.loads(document[document.index(b"{") :])
    return found
