"""The systems that are compared, and how each is started: always one relay, one worker, one client, over loopback tcp
unless the name says otherwise."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.stack import Part, Stack, free_port, own_python
from bench.venvs import python_of
from zfabric.transport.curve import create_keys

#: The role whose CPU time is the price of having the system in between.
HOP: Final = "hop"
WORKER: Final = "worker"
_KEYRING: Final = """
[client]
role = "operator"
key = "client.key"
[worker]
role = "worker"
key = "worker.key"
"""


def fabric(
    rate: float = 0, *, endpoint: str = "", curve: bool = False, backend: str = "echo", loop: str = "--uvloop"
) -> Stack:
    """zfabric: controller, echo worker."""
    target = endpoint or f"tcp://127.0.0.1:{free_port()}"
    controller = [sys.executable, "-m", "zfabric.cli.controller", "--endpoint", target, "--recovery-ms", "0", loop]
    worker = [sys.executable, "-m", "zfabric.cli.worker", "--endpoint", target, "--backend", backend, loop]
    worker += ["--slots", "20000", "--name", "bench"]
    if rate:
        worker += ["--tokens-per-second", str(rate), "--aligned"]
    if not curve:
        parts = [Part(HOP, tuple(controller)), Part(WORKER, tuple(worker))]
        return Stack(parts, "fabric", target, own_python())
    keys = Path(tempfile.mkdtemp(prefix="zf-bench-keys-"))
    for name in ("controller", "client", "worker"):
        create_keys(keys, name)
    (keys / "keyring.toml").write_text(_KEYRING)
    controller += ["--key", f"{keys}/controller.key_secret", "--keyring", f"{keys}/keyring.toml"]
    worker += ["--key", f"{keys}/worker.key_secret", "--controller-key", f"{keys}/controller.key"]
    environment = {"ZFABRIC_KEY": f"{keys}/client.key_secret", "ZFABRIC_CONTROLLER_KEY": f"{keys}/controller.key"}
    parts = [Part(HOP, tuple(controller)), Part(WORKER, tuple(worker))]
    return Stack(parts, "fabric", target, own_python(), environment)


def fabric_ipc(rate: float = 0) -> Stack:
    """zfabric over a Unix socket."""
    directory = Path(tempfile.mkdtemp(prefix="zf-bench-"))
    return fabric(rate, endpoint=f"ipc://{directory}/c.sock")


def fabric_curve(rate: float = 0) -> Stack:
    """zfabric with every connection encrypted."""
    return fabric(rate, curve=True)


def fabric_asyncio(rate: float = 0) -> Stack:
    """zfabric with daemons on asyncio's own loop."""
    return fabric(rate, loop="--no-uvloop")


def proxy() -> Stack:
    """The C proxy between bare peers."""
    front, back = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    parts = [
        Part(HOP, (sys.executable, "-m", "bench.servers.proxy", front, back)),
        Part(WORKER, (sys.executable, "-m", "bench.servers.bare_worker", back)),
    ]
    return Stack(parts, "bare", front, own_python())


def granian(python: Path, application: str, port: int, rate: float, **environment: str) -> Part:
    """An ASGI server: Granian, written in Rust, which measured fastest of those for Python."""
    command: tuple[str, ...] = (
        str(python),
        "-m",
        "granian",
        "--interface",
        "asgi",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    )
    command += ("--loop", "uvloop", "--http", "1", "--no-ws", "--workers", "1", "--log-level", "warning")
    command += ("--backlog", "8192", application)
    return Part(
        WORKER,
        command,
        f"http://127.0.0.1:{port}/health",
        {"ECHO_TOKENS_PER_SECOND": str(rate), "QUIET": "1", **environment},
    )


def http(rate: float = 0, **environment: str) -> Stack:
    """The ASGI server without anything in between."""
    python, port = python_of("http"), free_port()
    worker = granian(python, "bench.servers.asgi_echo:app", port, rate, **environment)
    return Stack([worker], "http", f"http://127.0.0.1:{port}", python)


def _router(command: Callable[[Path, str, int], tuple[str, ...]], rate: float, **environment: str) -> Stack:
    python, port, own = python_of("http"), free_port(), free_port()
    worker = granian(python, "bench.servers.asgi_echo:app", port, rate, **environment)
    router = command(python, f"http://127.0.0.1:{port}", own)
    ready = f"http://127.0.0.1:{own}/v1/models"
    return Stack([worker, Part(HOP, router, ready, {"QUIET": "1"})], "http", f"http://127.0.0.1:{own}", python)


def vllm_router(rate: float = 0, **environment: str) -> Stack:
    """vLLM's router (Rust)."""

    def command(python: Path, worker: str, port: int) -> tuple[str, ...]:
        return (
            str(python.parent / "vllm-router"), "--worker-urls", worker, "--host", "127.0.0.1", "--port", str(port),
            "--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port()),
        )  # fmt: skip

    return _router(command, rate, **environment)


def sglang_router(rate: float = 0, **environment: str) -> Stack:
    """SGLang's router (Rust)."""

    def command(python: Path, worker: str, port: int) -> tuple[str, ...]:
        return (
            str(python), "-m", "sglang_router.launch_router", "--worker-urls", worker, "--host", "127.0.0.1",
            "--port", str(port), "--policy", "round_robin", "--log-level", "error",
            "--prometheus-port", str(free_port()),
        )  # fmt: skip

    return _router(command, rate, **environment)


def smg(rate: float = 0, **environment: str) -> Stack:
    """Shepherd Model Gateway (Rust)."""

    def command(python: Path, worker: str, port: int) -> tuple[str, ...]:
        return (
            str(python.parent / "smg"), "launch", "--worker-urls", worker, "--host", "127.0.0.1",
            "--port", str(port), "--policy", "round_robin", "--log-level", "error",
            "--prometheus-port", str(free_port()),
        )  # fmt: skip

    return _router(command, rate, **environment)


def fastchat() -> Stack:
    """FastChat's controller, streams passed through it."""
    python, port, own = python_of("fastchat"), free_port(), free_port()
    controller, worker = f"http://127.0.0.1:{own}", f"http://127.0.0.1:{port}"
    command = (str(python), "-m", "fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(own))
    log_dir = tempfile.mkdtemp(prefix="zf-bench-")
    parts = [
        Part(HOP, command, f"127.0.0.1:{own}", {"QUIET": "1", "LOGDIR": log_dir}),
        granian(
            python, "bench.servers.fastchat_worker:app", port, 0, FASTCHAT_CONTROLLER=controller, FASTCHAT_OWN=worker
        ),
    ]
    return Stack(parts, "fastchat", controller, python)


def grpc(rate: float = 0) -> Stack:
    """gRPC's asyncio server and client, nothing in between."""
    python, port = python_of("rpc"), free_port()
    worker = Part(
        WORKER, (str(python), "-m", "bench.servers.rpc_echo", str(port)), "line", {"ECHO_TOKENS_PER_SECOND": str(rate)}
    )
    return Stack([worker], "rpc", f"127.0.0.1:{port}", python)


def nats(rate: float = 0) -> Stack:
    """NATS: its server (Go) in between."""
    python, port = python_of("rpc"), free_port()
    server = (str(python.parent / "nats-server"), "-a", "127.0.0.1", "-p", str(port))
    url = f"nats://127.0.0.1:{port}"
    worker = (str(python), "-m", "bench.servers.nats_echo", url)
    parts = [
        Part(HOP, server, f"127.0.0.1:{port}", {"QUIET": "1"}),
        Part(WORKER, worker, "line", {"ECHO_TOKENS_PER_SECOND": str(rate)}),
    ]
    return Stack(parts, "nats", url, python)


#: Name in tables → how to start it.
SUBJECTS: Final[dict[str, Callable[[], Stack]]] = {
    "zfabric": fabric,
    "zfabric ipc": fabric_ipc,
    "zfabric curve": fabric_curve,
    "zfabric asyncio": fabric_asyncio,
    "zmq_proxy": proxy,
    "http": http,
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "smg": smg,
    "fastchat": fastchat,
    "grpc": grpc,
    "nats": nats,
}
