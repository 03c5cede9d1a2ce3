"""Real engines: through the fabric, alone, and behind their usual HTTP server. Each where it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys

from bench.record import Report, Table
from bench.runner import Bench
from bench.stack import ROOT

NAME = "engines"
TITLE = "Engines: real models through the fabric"
#: Module that measures → what has to be installed, and its arguments.
_ENGINES = {
    "transformers": (("torch", "transformers"), ["--models", "tiny", "smollm2"]),
    "vllm": (("torch", "vllm"), ["--model", "smollm2"]),
    "hf_api": (("httpx2",), []),
}
_LIMIT_S = 900


async def run(bench: Bench, report: Report) -> None:
    """A process an engine: what one leaves behind must not be measured with the next. Not part of a quick run."""
    if bench.quick:
        report.skipped.append("real engines take minutes to load: they are part of the full run alone")
        return
    for name, (modules, arguments) in _ENGINES.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            report.skipped.append(f"{name}: {', '.join(missing)} is not installed (make test installs all engines)")
            continue
        bench.say(f"{name}, up to {_LIMIT_S // 60} minutes")
        command = [sys.executable, "-m", f"bench.engines.{name}", *arguments]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, cwd=ROOT
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _LIMIT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            report.skipped.append(f"{name}: took more than {_LIMIT_S} s")
            continue
        if process.returncode:
            report.skipped.append(f"{name}: ended with {process.returncode}")
            continue
        document = json.loads(output[output.index(b"{") :])
        rows = [[key, f"{value:,.3f}"] for key, value in _leaves(document)]
        report.tables.append(Table(f"{name}: as `python -m bench.engines.{name}` prints it", ["figure", "value"], rows))


def _leaves(document: object, path: str = "") -> list[tuple[str, float]]:
    """All numbers of a document, under their paths."""
    if isinstance(document, bool) or document is None or isinstance(document, str):
        return []
    if isinstance(document, int | float):
        return [(path, float(document))]
    items = document.items() if isinstance(document, dict) else enumerate(document)  # type: ignore[arg-type]
    return [leaf for key, value in items for leaf in _leaves(value, f"{path}.{key}".strip("."))]
