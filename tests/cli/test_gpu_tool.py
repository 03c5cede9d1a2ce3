"""`make test-gpu`, as far as it goes without a GPU: what it takes from a folder of wheels, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_wheel(folder: Path, name: str, requires: str = "") -> None:
    """A wheel with one module."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "here = 1\n")
        needed = f"Requires-Dist: {requires}\n" if requires else ""
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needed}")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_what_is_gathered_is_locked_and_has_all_that_is_wanted(gpu: ModuleType) -> None:
    locked = {
        re.split(r"[=; ]", line)[0]
        for lock in gpu.LOCKS
        for line in (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines()
        if re.match(r"[a-z]", line)
    }
    wanted = {re.split(r"[<>=; ]", one)[0] for one in gpu.requirements()}
    # Which build of torch is right, the host knows.
    assert wanted - {"torch"} <= locked
    assert "torch" not in locked
    assert set(gpu.MODELS) <= locked


def test_wheels_for_another_python_are_asked_for_by_their_platforms(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main(["wheels", "--to", str(tmp_path), "--python", "3.12", "--machine", "aarch64"]) == 0
    (command,) = commands
    for option in ("--require-hashes", "--no-deps", "--only-binary=:all:"):
        assert option in command
    assert command[command.index("--python-version") + 1] == "3.12"
    assert "manylinux_2_28_aarch64" in command


def test_an_environment_is_made_of_the_host_and_the_folder_alone(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "venv"
    assert gpu.make_environment(target, wheels) is None
    assert "has no wheels" in capsys.readouterr().err
    save_wheel(wheels, "zfabric_nothing", requires="msgspec")
    monkeypatch.setattr(gpu, "MODELS", ("zfabric_nothing",))
    monkeypatch.setattr(gpu, "requirements", lambda: ["zfabric_nothing", "msgspec"])
    # Neither an index nor a folder of this host's settings may be asked.
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.invalid/simple")
    python = gpu.make_environment(target, wheels)
    assert python is not None
    script = "import zfabric_nothing, msgspec; print(zfabric_nothing.__file__); print(msgspec.__file__)"
    here, host = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()
    assert Path(here).is_relative_to(target)
    assert not Path(host).is_relative_to(target)
    monkeypatch.setattr(gpu, "requirements", lambda: ["zfabric-is-not-there"])
    assert not gpu.install(python, wheels)
    assert "lack something" in capsys.readouterr().err


def test_files_with_tests_for_a_gpu_are_found(gpu: ModuleType) -> None:
    names = {path.name for path in gpu.marked_files()}
    assert {"test_device.py", "test_paged.py", "test_weights.py"} <= names
    assert "test_text.py" not in names


TESTS = """
import pytest

pytestmark = pytest.mark.gpu


def test_well():
    pass


def test_not():
    assert 1 == 2, "wrong"


@pytest.mark.skip(reason="no device")
def test_never():
    pass


def test_broken(missing):
    pass
"""


def test_one_file_has_all_of_it(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_one.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: a GPU"]\n')
    (tmp_path / "bench" / "engines").mkdir(parents=True)
    for package in ("bench", "bench/engines"):
        (tmp_path / package / "__init__.py").touch()
    script = 'import json, sys; print("hello"); print(json.dumps({"engine": "transformers", "args": sys.argv[1:]}, indent=2))'
    (tmp_path / "bench" / "engines" / "transformers.py").write_text(script)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "marked_files", lambda: [tmp_path / "test_one.py"])
    monkeypatch.setattr(gpu, "make_environment", lambda target, wheels: Path(sys.executable))
    output = tmp_path / "out" / "results.json"
    arguments = [
        "run",
        "--wheels",
        str(tmp_path),
        "--device",
        "cpu",
        "--quick",
        "--models",
        "tiny",
        "--output",
        str(output),
    ]
    assert gpu.main(arguments) == 1
    found = json.loads(output.read_text())
    assert found["tests"]["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    tests = {test["test"].rpartition("::")[2]: test for test in found["tests"]["tests"]}
    assert "wrong" in tests["test_not"]["why"]
    assert tests["test_never"]["why"] == "no device"
    assert "why" not in tests["test_well"]
    assert found["bench"]["args"][:6] == ["--device", "cpu", "--dtype", "float32", "--models", "tiny"]
    assert "--quick" in found["bench"]["args"]
    environment = found["environment"]
    assert re.match(r"\d+\.\d+", environment["versions"]["torch"])
    assert ("--vllm" in found["bench"]["args"]) == (environment["versions"]["vllm"] is not None)
    assert environment["gpus"] == gpu.gpus()
    # A benchmark that ends badly leaves what the tests were.
    (tmp_path / "bench" / "engines" / "transformers.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(gpu, "run_tests", lambda python, directory: found["tests"])
    monkeypatch.setattr(gpu, "described", lambda python: environment)
    assert gpu.main(arguments) == 1
    later = json.loads(output.read_text())
    assert later["bench"]["failed"] == "exit code 3"
    assert later["tests"] == found["tests"]
    capsys.readouterr()
    monkeypatch.setattr(gpu, "described", lambda python: {"cuda_available": False})
    assert gpu.main(["run", "--wheels", str(tmp_path)]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_gpus_are_told_as_the_driver_names_them(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.1, 81559 MiB, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    named = {
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "570.1",
        "memory.total": "81559 MiB",
        "compute_cap": "9.0",
    }
    assert gpu.gpus() == [named]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.gpus() == []
