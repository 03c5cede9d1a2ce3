"""The tree tells the story: imports point down the list of layers, and the core knows no world."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from zfabric.errors import FabricError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "zfabric"

#: What each part may import of the project; parts not named here are checked to be named.
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "errors": set(),
    "limits": set(),
    "ids": set(),
    "directories": set(),
    # Looks at files that are read anew, for whoever has such.
    "files": {"errors", "limits"},
    "sounds": {"errors", "limits"},
    "wire": {"errors", "limits", "ids"},
    "zmtp": set(),
    "core": {"wire", "errors", "limits", "ids"},
    "transport": {"wire", "zmtp", "errors", "limits", "ids"},
    "recording": {"errors", "limits"},
    # A rule for a model's replicas stands in a fleet's file.
    "fleet": {"core", "errors", "limits"},
    "controller": {"files", "core", "recording", "transport", "wire", "errors", "limits", "ids", "version"},
    # A client that traces imports `tracing` when it is made.
    "client": {"tracing", "core", "transport", "wire", "errors", "limits", "ids", "version"},
    "worker": {"core", "recording", "transport", "wire", "errors", "limits", "ids", "version"},
    "backends": {"worker", "sounds", "wire", "directories", "errors", "limits"},
    # A program that uses the client library, as any other could: it sees nothing of the fabric below that.
    "gateway": {"client", "sounds", "core", "wire", "errors", "limits"},
    # Another such program, for a person at a terminal.
    "top": {"client", "wire", "errors", "limits"},
    "models": {"directories", "errors"},
    "monitoring": {"controller", "worker", "gateway", "core", "errors", "limits"},
    # `serving` runs a backend in a test's own process, which takes all parties; it imports them when it is called.
    "testing": {"controller", "client", "worker", "core", "recording", "transport", "wire", "errors", "limits", "ids"},
    "tracing": {"core", "wire", "errors", "version"},
    "cli": {
        "fleet",
        "monitoring",
        "tracing",
        "gateway",
        "controller",
        "client",
        "worker",
        "backends",
        "files",
        "core",
        "recording",
        "transport",
        "wire",
        "errors",
        "limits",
        "version",
    },
    "__init__": {"backends", "client", "worker", "transport", "wire", "errors", "version"},
}
#: The rooms of the transformers backend, from the lowest: each imports itself and those before it.
TRANSFORMERS_ROOMS = (
    "cpu_kernels",
    "parameters",
    "request",
    "sampling",
    "cache",
    "runner",
    "pooling",
    "loading",
    "checks",
    "speculative",
    "scheduling",
    "setup",
)
#: Modules of the standard library and others that a part must not touch.
FORBIDDEN: dict[str, set[str]] = {
    "wire": {"asyncio", "zmq", "time", "os", "random"},
    "zmtp": {"asyncio", "zmq", "time", "os", "random", "socket", "secrets", "threading", "logging"},
    "core": {"asyncio", "zmq", "time", "threading", "logging", "os", "uuid", "secrets", "socket", "datetime"},
    "client": {"zmq"},
    "worker": {"zmq"},
    "controller": {"zmq"},
    "backends": {"zmq"},
    "testing": {"zmq"},
    "gateway": {"zmq"},
    "top": {"zmq"},
}

#: But these files.
EXCEPTED = {
    # vLLM publishes what it has cached on a socket of its own.
    "backends/vllm_engine/compat/cache_events.py": {"zmq"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
            if node.module == "zfabric":
                found |= {f"zfabric.{alias.name}" for alias in node.names}
    return found


def test_no_part_is_below_itself() -> None:
    """What is allowed above has no circle: else imports that keep to it could point both ways."""
    graphlib.TopologicalSorter(ALLOWED).prepare()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    for name in imports_of(path):
        first, _, rest = name.partition(".")
        if first != "zfabric":
            forbidden = FORBIDDEN.get(part, set()) - EXCEPTED.get(str(path.relative_to(PACKAGE)), set())
            assert first not in forbidden, f"{part} must not import {first}"
            continue
        target = rest.partition(".")[0]
        if target and target != part:
            assert target in ALLOWED[part], f"{part} must not import zfabric.{rest}"


@pytest.mark.parametrize("room", TRANSFORMERS_ROOMS)
def test_the_rooms_of_the_transformers_backend_import_what_is_below_them(room: str) -> None:
    package = PACKAGE / "backends" / "hf_transformers"
    below = {"options", "failures", *TRANSFORMERS_ROOMS[: TRANSFORMERS_ROOMS.index(room) + 1]}
    for path in (package / room).glob("*.py"):
        for name in imports_of(path):
            _, ours, rest = name.partition("zfabric.backends.hf_transformers.")
            assert not ours or rest.partition(".")[0] in below, f"{path.name} of {room} must not import {name}"


def test_each_room_of_the_transformers_backend_has_its_place() -> None:
    package = PACKAGE / "backends" / "hf_transformers"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(TRANSFORMERS_ROOMS)


def test_the_gateway_has_of_the_core_only_how_durations_are_counted() -> None:
    found = {name for path in (PACKAGE / "gateway").glob("*.py") for name in imports_of(path)}
    assert {name for name in found if name.startswith("zfabric.core")} == {"zfabric.core.histogram"}


def test_the_machines_do_not_know_one_another() -> None:
    """Each of the three in `core` imports its own room and what lies beside the rooms."""
    rooms = {"controller", "worker", "client"}
    for room in rooms:
        for path in (PACKAGE / "core" / room).glob("*.py"):
            others = {f"zfabric.core.{other}" for other in rooms - {room}}
            assert not [name for name in imports_of(path) if name.startswith(tuple(others))], path
        for path in (PACKAGE / "core" / room).glob("*.py"):
            assert not [name for name in imports_of(path) if name.startswith("zfabric.core.cell")], path
    # A cell is a worker whose engine is a controller: it knows these two, and neither of them knows it.
    for path in (PACKAGE / "core" / "cell").glob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith("zfabric.core.client")], path
    for path in (PACKAGE / "core").glob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith("zfabric.core.")], path


def test_core_draws_no_chance_of_its_own() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
                assert node.attr == "Random", f"{path.name}:{node.lineno} uses random.{node.attr}"


def test_files_do_one_thing() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


def test_functions_fit_a_screen() -> None:
    for path in modules():
        if part_of(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno < 70, f"{path.name}:{node.lineno} {node.name}"


def test_importing_is_light() -> None:
    """No torch, no numpy, no event loop's globals, and nothing of the command line."""
    code = "import sys, zfabric; print(*sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    loaded = {name.partition(".")[0] for name in output.split()}
    assert not loaded & {
        "torch",
        "numpy",
        "transformers",
        "uvloop",
        "rich",
        "cyclopts",
        "structlog",
        "prometheus_client",
        "opentelemetry",
        "uvicorn",
        "ray",
    }


def test_the_simulator_has_no_time_but_its_own() -> None:
    """What it runs of asyncio runs on a loop whose time is the world's; only what runs a backend for its author has a real
    one, and takes the real parties when it is called."""
    for path in (PACKAGE / "testing").glob("*.py"):
        if path.stem != "serving":
            assert not {"time", "uvloop", "selectors", "socket"} & imports_of(path) - (
                {"time"} if path.stem == "runner" else set()
            )


def test_public_names_are_pinned() -> None:
    import zfabric
    from zfabric import errors

    names = """AnswerOptions AnswerReader AnswerStream AsyncClient BaseModelWorker BlockingBatch BlockingStream ChatMessage
        Choice Classification Client Completion CompletionBatch CountRequest Credentials Delta EmbedOptions
        EmbedRequest EmbedResult EmbedTokensOptions GenerateOptions GenerateRequest
        Logprob ModelInfo SamplingParams StepwiseModelWorker TextModelWorker
        TokenLogprobs TokenStream ToolCall ToolCallDelta Usage __version__"""
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, FabricError)}
    assert {"FabricError", "WorkerLostError", "ClosedError"} <= tree
    assert set(zfabric.__all__) == set(names.split()) | tree
    assert all(hasattr(zfabric, name) for name in zfabric.__all__)


def test_nothing_is_unpickled() -> None:
    """Whoever unpickles bytes runs them."""
    unpicklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
    for path in modules():
        assert not {name.partition(".")[0] for name in imports_of(path)} & unpicklers, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "numpy.load", "np.load"}:
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert safe.get("weights_only") == "True", f"{path.name}:{node.lineno} may unpickle"


def test_only_who_is_told_to_fetches_addresses() -> None:
    """What speaks HTTP as a client is the backend whose operator gives it an address, and the exporter of traces."""
    clients = {
        "httpx",
        "httpx2",
        "requests",
        "aiohttp",
        "urllib3",
        "urllib.request",
        "http.client",
        "ftplib",
        "smtplib",
    }
    found = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        for name in imports_of(path)
        if name in clients or name.partition(".")[0] in clients
    }
    assert {name for name in found if not name.startswith("backends/hf_api/")} == set()
