"""Makes .venv and installs a locked set of requirements into it. Uses nothing but the standard library.

Usage: python3 tools/bootstrap.py {core,bench,clients,demo,test,docs,previous}

Some sets go into environments of their own, beside the others: `previous` into .venv-previous, the release of vLLM before the
one that `test` has; `clients` into .venv-clients, programs of others that call the gateway; `docs` into .venv-docs, what builds
the pages, and no more.

A set that is installed already, unchanged, is left alone at once. uv does the installing where it can be had, because it
is several times faster; pip does otherwise, and where uv fails. Indexes and local wheel folders that pip is set up for
hold for uv as well.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
#: Each set, and the sets that hold all of it.
SETS = {
    "core": ("core", "bench", "demo", "test"),
    "bench": ("bench", "test"),
    "demo": ("demo", "test"),
    "test": ("test",),
    "docs": ("docs",),
    "previous": ("previous",),
    "clients": ("clients",),
}
#: Sets with an environment of their own.
APART = {name: ROOT / f".venv-{name}" for name in ("clients", "docs", "previous")}
#: Builds of vLLM, by set.
VLLM = {"test": "vllm", "previous": "vllm-previous"}
#: Sets that hold what needs torch.
TORCH = ("clients", "demo", "previous", "test")
#: What a Chromium may be called.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OLDEST = (3, 11)
#: Looked for when the Python that runs this is too old.
NAMES = ("python3.14", "python3.13", "python3.12", "python3.11")
#: What pip's settings are called in uv's command line. The lock says what is installed, so pip's constraints do not matter.
PIP_TO_UV = {"find-links": "--find-links", "index-url": "--default-index", "extra-index-url": "--index"}
#: Seconds of silence before a download counts as failed. Wheels of hundreds of megabytes come over networks that stall for
#: longer than the 15 and 30 s that pip and uv allow. What the caller has set for either holds.
PATIENCE = {"PIP_DEFAULT_TIMEOUT": "120", "UV_HTTP_TIMEOUT": "120"}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        print(__doc__, file=sys.stderr)
        return 2
    if sys.version_info < OLDEST:
        return _with_another_python()
    wanted = sys.argv[1]
    code = install(wanted, APART.get(wanted, VENV))
    if code == 0 and wanted == "test":
        get_browser()
    return code


def get_browser() -> None:
    """Install Chromium, where there is none and this may: on Debian and its like, as root. Else tests of pages are skipped."""
    if any(map(shutil.which, BROWSERS)) or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    _say("installing Chromium, for the tests of pages")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        done = subprocess.run(
            ["apt-get", "-qq", *command], check=False, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            _say(f"apt-get {command[0]} does not manage that: {done.stderr.strip()[-200:]}")
            return


def install(wanted: str, target: Path) -> int:
    """Bring a virtual environment to a set. Returns the exit code."""
    stamp = target / "zfabric.stamp"
    python = target / "bin" / "python"
    found = stamp.read_text() if stamp.exists() else ""
    if python.exists() and any(found == stamp_of(larger) for larger in SETS[wanted]):
        return 0
    started = time.monotonic()
    # An installation that is interrupted must not pass for the one before.
    stamp.unlink(missing_ok=True)
    moved = bool(found) and not found.endswith(f" {ROOT}")
    if moved or not python.exists():
        _say(f"creating {target.name} with Python {sys.version.split()[0]}")
        try:
            venv.create(target, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{target} cannot be created (is Python's venv module installed?): {error}", file=sys.stderr)
            return 1
    if not _install_all(wanted, python, steps_of(wanted)):
        return 1
    stamp.write_text(stamp_of(wanted))
    _say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def steps_of(wanted: str) -> list[list[str]]:
    """What an installer is asked for, one command after the other.

    Every file is checked against the hashes of its lock, and nothing comes that no lock names, but for torch: it has a build for
    each accelerator, with hashes of its own, and whoever sets the index up chooses among them.
    """
    locked = [wanted, *(["models"] if wanted in ("demo", *VLLM) else [])]
    if wanted in VLLM:
        # It asks for a CPU build of torch by name, which no index has, and runs on any build of that version.
        locked.append(VLLM[wanted])
    steps = [["--no-deps", "--require-hashes", "-r", _lock(name)] for name in locked]
    if wanted in TORCH:
        steps.append(["-r", _lock("torch")])
    return [*steps, ["--no-deps", "--editable", str(ROOT)]]


def stamp_of(name: str) -> str:
    """What was installed and where: the set, a hash of the locks and the project file, and the checkout."""
    digest = hashlib.sha256()
    for lock in (name, "models", VLLM.get(name, "vllm"), "torch", "build", "uv"):
        digest.update((ROOT / "requirements" / f"{lock}.txt").read_bytes())
    digest.update((ROOT / "pyproject.toml").read_bytes())
    return f"{name} {digest.hexdigest()} {ROOT}"


def uv_options(pip_settings: str) -> list[str]:
    """Options for uv, which does not read pip's configuration, from what `pip config list` prints."""
    options: list[str] = []
    for line in pip_settings.splitlines():
        key, _, value = line.partition("=")
        option = PIP_TO_UV.get(key.rpartition(".")[2])
        for item in value.strip("'\"").replace("\\n", " ").split():
            if option is not None and [option, item] not in [options[n : n + 2] for n in range(0, len(options), 2)]:
                options += [option, item]
    # pip takes the best version of all indexes; uv would stop at the first one that knows the name.
    return [*options, "--index-strategy", "unsafe-best-match"] if "--index" in options else options


def _install_all(wanted: str, python: Path, steps: list[list[str]]) -> bool:
    """Every step with the first installer that manages it."""
    pip = [str(python), "-m", "pip", "install", "--progress-bar", "on"]
    installers = [pip]
    _say("getting uv")
    locked = ["--no-deps", "--require-hashes", "-r", _lock("uv")]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *locked], check=False, capture_output=True)
    uv = python.parent / "uv"
    if uv.exists():
        listing = subprocess.run(
            [str(python), "-m", "pip", "config", "list"], check=False, capture_output=True, text=True
        )
        installers.insert(0, [str(uv), "pip", "install", "--python", str(python), *uv_options(listing.stdout)])
    for number, step in enumerate(steps, start=1):
        _say(f"installing the {wanted} requirements, step {number} of {len(steps)}")
        while not _run([*installers[0], *step]):
            if len(installers) == 1:
                print(f"\ninstalling failed: {' '.join([*installers[0], *step])}", file=sys.stderr)
                _say(f"the {wanted} requirements are not installed; run this again: finished downloads are kept")
                return False
            _say("uv does not manage that; trying pip")
            del installers[0]
    return True


def environment() -> dict[str, str]:
    """What installers run with: the caller's environment, patience where it has none set, and what builds this project."""
    build = {"PIP_BUILD_CONSTRAINT": _lock("build"), "UV_BUILD_CONSTRAINT": _lock("build")}
    return {**PATIENCE, **os.environ, **build, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_LINK_MODE": "copy"}


def _lock(name: str) -> str:
    return str(ROOT / "requirements" / f"{name}.txt")


def _run(command: list[str]) -> bool:
    return subprocess.run(command, check=False, env=environment(), cwd=ROOT).returncode == 0


def _with_another_python() -> int:
    """Run this again with a Python that is new enough, if there is one."""
    for name in NAMES:
        path = shutil.which(name)
        # A launcher of a version manager may be there without the version.
        if path and subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0:
            return subprocess.run([path, *sys.argv], check=False).returncode
    wanted = ".".join(str(part) for part in OLDEST)
    print(f"Python {sys.version.split()[0]} is too old: zfabric needs {wanted} or newer", file=sys.stderr)
    return 2


def _say(text: str) -> None:
    print(f"── {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
