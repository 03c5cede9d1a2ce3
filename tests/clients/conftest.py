"""What the programs call: `zfabric serve` with real models, from the environment that has the engines."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: The clients are in an environment of their own; the engines in that of the other tests.
ENGINES = ROOT / ".venv" / "bin" / "python"
if find_spec("litellm") is None:
    # This is not the environment of the clients. What the others have of it, OpenAI's SDK, is in tests/gateway.
    collect_ignore_glob = ["test_*.py"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
#: More flags of the worker, by engine.
FLAGS = {
    "transformers": ("--threads", "1", "--device", "cpu"),
    # In bfloat16 its kernels for CPUs answer otherwise in another company.
    "vllm": (
        "--dtype",
        "float32",
        "--max-model-len",
        "2048",
        "--enforce-eager",
        "--distributed-executor-backend",
        "uni",
    ),
}
#: The name of the model in all tests.
MODEL = "smollm2"


@dataclass(frozen=True)
class Served:
    """A running `zfabric serve`.

    Attributes:
        url: The base of its API, with /v1.
        backend: Its engine.
        directory: Of the model's files.
        said: Lines that it printed.
    """

    url: str
    backend: str
    directory: Path
    said: list[str]

    @property
    def root(self) -> str:
        """Where the gateway listens."""
        return self.url.removesuffix("/v1")


@pytest.fixture(scope="session", params=["transformers", "vllm"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """SmolLM2-135M-Instruct."""
    yield from _serve(MODEL, request.param)


@pytest.fixture(scope="session")
def minilm() -> Iterator[Served]:
    """all-MiniLM-L6-v2, for vectors."""
    yield from _serve("minilm", "transformers")


def _serve(name: str, backend: str) -> Iterator[Served]:
    told = subprocess.run([ENGINES, "-m", "zfabric.models", name], capture_output=True, text=True, check=True, cwd=ROOT)
    directory = Path(told.stdout.strip())
    command = [str(ENGINES), "-m", "zfabric.cli.main", "serve", str(directory), "--backend", backend, "--port", "0"]
    with tempfile.TemporaryDirectory(prefix="zf-") as short, open(f"{short}/log", "w+") as log:
        with subprocess.Popen(
            [*command, "--endpoint", f"ipc://{short}/c.sock", "--", "--model-names", name, *FLAGS[backend]],
            stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT},
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                said = [process.stdout.readline(), process.stdout.readline()]
                assert said[0].startswith("ready url="), Path(log.name).read_text()
                words = dict(word.partition("=")[::2] for word in said[0].split()[1:])
                assert words["models"] == name
                yield Served(words["url"], backend, directory, said)
            finally:
                process.terminate()
        assert process.returncode == 0


def run(program: str, *arguments: str | Path, limit_s: float = 280, **environment: str) -> str:
    """What a program of the clients' environment prints.

    Raises:
        AssertionError: It failed.
    """
    path = Path(sys.executable).parent / program
    done = subprocess.run(
        [path, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment},
        timeout=limit_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{program}: {done.stdout[-2_000:]}{done.stderr[-4_000:]}"
    return done.stdout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines start, and load tools take their time."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(400))
