"""What `make` does before it runs anything: an environment that is as the lock says, or a sentence."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, that installs nothing and notes what it would have."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    installed: list[str] = []

    def create(target: Path, *, with_pip: bool, clear: bool) -> None:
        assert with_pip
        assert clear
        (target / "bin").mkdir(parents=True, exist_ok=True)
        (target / "bin" / "python").touch()
        installed.append("venv")

    def install_all(wanted: str, python: Path, steps: list[list[str]]) -> bool:
        assert not (python.parent.parent / "zfabric.stamp").exists()
        installed.append(wanted)
        return getattr(module, "succeeds", True)

    monkeypatch.setattr(module.venv, "create", create)
    monkeypatch.setattr(module, "_install_all", install_all)
    vars(module)["installed"] = installed
    return module


def test_an_unchanged_set_is_left_alone_and_so_is_a_smaller_one(bootstrap: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "venv"
    for wanted in ("core", "core", "test", "demo", "core", "test"):
        assert bootstrap.install(wanted, target) == 0
    assert bootstrap.installed == ["venv", "core", "test"]


def test_an_interrupted_installation_does_not_count(bootstrap: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "venv"
    assert bootstrap.install("core", target) == 0
    vars(bootstrap)["succeeds"] = False
    assert bootstrap.install("demo", target) == 1
    vars(bootstrap)["succeeds"] = True
    assert bootstrap.install("core", target) == 0
    assert bootstrap.installed == ["venv", "core", "demo", "core"]


def test_a_lost_interpreter_or_a_moved_checkout_begins_anew(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "venv"
    assert bootstrap.install("core", target) == 0
    (target / "bin" / "python").unlink()
    assert bootstrap.install("core", target) == 0
    monkeypatch.setattr(bootstrap, "stamp_of", lambda name: f"{name} 0 /somewhere/else")
    (target / "zfabric.stamp").write_text("core 1 /somewhere/before")
    assert bootstrap.install("core", target) == 0
    assert bootstrap.installed == ["venv", "core"] * 3


def test_settings_of_pip_hold_for_uv(bootstrap: ModuleType) -> None:
    listing = """:env:.find-links='/wheels'
global.find-links='/wheels'
global.index-url='https://one.example/simple'
global.extra-index-url='https://two.example/simple https://three.example/simple'
global.timeout='5'
"""
    assert bootstrap.uv_options(listing) == [
        *("--find-links", "/wheels"),
        *("--default-index", "https://one.example/simple"),
        *("--index", "https://two.example/simple"),
        *("--index", "https://three.example/simple"),
        *("--index-strategy", "unsafe-best-match"),
    ]
    assert bootstrap.uv_options("") == []


def test_a_download_may_stall_as_long_as_the_caller_says(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UV_HTTP_TIMEOUT", raising=False)
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "7")
    found = bootstrap.environment()
    assert int(found["UV_HTTP_TIMEOUT"]) >= 60
    assert found["PIP_DEFAULT_TIMEOUT"] == "7"


def test_an_installation_that_fails_says_which_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commands: list[list[str]] = []

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(module.subprocess, "run", fail)
    python = tmp_path / "python"
    (tmp_path / "uv").touch()
    assert module._install_all("previous", python, [["-r", "previous.txt"]]) is False
    assert [Path(command[0]).name for command in commands] == ["python", "python", "uv", "python"]
    told = capsys.readouterr().err
    assert "trying pip" in told
    assert "the previous requirements are not installed; run this again" in told


def test_a_python_that_is_too_old_looks_for_another(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "OLDEST", (4, 0))
    monkeypatch.setattr(bootstrap, "NAMES", ("python3.14",))
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "core"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.main() == 2
    assert "needs 4.0 or newer" in capsys.readouterr().err
    newer = tmp_path / "python3.14"
    newer.write_text('#!/bin/sh\n[ "$1" = -c ] || exit 7\n')
    newer.chmod(0o755)
    assert bootstrap.main() == 7


def test_a_browser_is_installed_once_and_only_by_root(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = f'#!/bin/sh\necho "$2" >> {tmp_path}/asked\n[ "$2" = update ] || touch {tmp_path}/chromium\n'
    (tmp_path / "apt-get").write_text(script)
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: (tmp_path / name).exists() or None)
    user = 1_000
    monkeypatch.setattr(bootstrap.os, "geteuid", lambda: user)
    bootstrap.get_browser()
    assert not (tmp_path / "asked").exists()
    user = 0
    bootstrap.get_browser()
    bootstrap.get_browser()
    assert (tmp_path / "asked").read_text().split() == ["update", "install"]


def test_wrong_use_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bootstrap.py", "everything"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Usage:" in done.stderr


#: torch has a build for each accelerator, and its hashes are those of whichever the index has: requirements/README.md.
LOCKS = sorted(path.stem for path in (ROOT / "requirements").glob("*.txt") if path.stem != "torch")


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_exactly_with_hashes_and_name_no_place(name: str) -> None:
    pins = (ROOT / "requirements" / f"{name}.txt").read_text().replace(" \\\n    --hash", " --hash").splitlines()
    assert pins
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.]+( ; [^/@]+?)?( --hash=sha256:[0-9a-f]{64})+", pin), pin
    assert not [
        pin for pin in pins if pin.startswith(("nvidia-", "cuda-", "torch==", "triton", "torchvision", "torchaudio"))
    ]


def test_all_but_torch_and_this_project_is_installed_by_hash(bootstrap: ModuleType) -> None:
    locks = {step[-1].rpartition("/")[2] for wanted in bootstrap.SETS for step in bootstrap.steps_of(wanted)}
    by_hash = set()
    for wanted in bootstrap.SETS:
        for step in bootstrap.steps_of(wanted):
            if "--require-hashes" in step:
                assert "--no-deps" in step
                by_hash.add(Path(step[-1]).name)
    assert locks - by_hash == {"torch.txt", ROOT.name}
    assert {f"{name}.txt" for name in LOCKS} - by_hash == {"build.txt", "gpu.txt", "uv.txt"}
    assert (ROOT / "requirements" / "torch.txt").read_text().count("==") == 1
