"""Virtual environments of the peers: pinned, made once, found again by the hash of their pins."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

from tools.bootstrap import uv_options

ROOT: Final = Path(__file__).resolve().parent.parent
#: Outside of version control.
CACHE: Final = ROOT / ".bench"
_PINS: Final = ROOT / "bench" / "peers"
NAMES: Final = tuple(sorted(path.stem for path in _PINS.glob("*.txt")))


class PeerMissingError(RuntimeError):
    """A peer cannot be had here; the suite goes on without it."""


def python_of(name: str) -> Path:
    """The peer's interpreter; installs what it needs on first use.

    Raises:
        PeerMissingError: The installation failed.
    """
    pins = _PINS / f"{name}.txt"
    home = CACHE / f"{name}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    python, stamp = home / "bin" / "python", home / "complete"
    if not stamp.exists():
        shutil.rmtree(home, ignore_errors=True)
        print(f"── installing the {name} peers into {home.relative_to(ROOT)}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True)
        _install(python, pins)
        stamp.touch()
    return python


def _install(python: Path, pins: Path) -> None:
    pip = [str(python), "-m", "pip"]
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    settings = subprocess.run([*pip, "config", "list"], check=False, capture_output=True, text=True).stdout
    tries = [[uv, "pip", "install", "--python", str(python), *uv_options(settings)]] if uv else []
    tries.append([*pip, "install", "--quiet"])
    said = ""
    for command in tries:
        done = subprocess.run([*command, "--no-deps", "-r", str(pins)], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:][0] if done.stderr or done.stdout else ""
    raise PeerMissingError(f"{pins.stem} cannot be installed: {said}")
