"""The systems that are compared, and how each is started: always one relay, one worker, one client, over loopback tcp
unless the name says otherwise."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from bench.stack import Part, Stack, free_port, own_python
from bench.venvs import python_of
from zfabric.transport.curve import create_keys
from zfabric.transport.links import TRANSPORT_VARIABLE, TRANSPORTS, Transport, choose

#: The role whose CPU time is the price of having the system in between.
HOP: Final = "hop"
WORKER: Final = "worker"
#: Beside the hop, where that is a gateway.
CONTROLLER: Final = "controller"
#: The controller below the hop, where there are two.
CELL: Final = "cell"
_KEYRING: Final = """
[client]
role = "operator"
key = "client.key"
[worker]
role = "worker"
key = "worker.key"
"""


def fabric(
    rate: float = 0,
    *,
    ipc: bool = False,
    curve: bool = False,
    recorded: bool = False,
    loop: str = "--uvloop",
    transport: Transport | None = None,
    adapter: str = "fabric",
    metrics: bool = False,
    controllers: int = 1,
) -> Stack:
    """zfabric: controller, echo worker. Its driver is the run's if none is named."""
    driver = choose(transport)
    scratch = Path(tempfile.mkdtemp(prefix="zf-bench-"))
    first = f"ipc://{scratch}/c.sock" if ipc else f"tcp://127.0.0.1:{free_port()}"
    others = [f"tcp://127.0.0.1:{free_port()}" for _ in range(1, controllers)]
    target = ",".join([first, *others])
    controller = [sys.executable, "-m", "zfabric.cli.controller", "--endpoint", first, "--recovery-ms", "0", loop]
    worker = [sys.executable, "-m", "zfabric.cli.worker", "--endpoint", target, "--backend", "echo", loop]
    worker += ["--slots", "20000", "--name", "bench"]
    if rate:
        worker += ["--tokens-per-second", str(rate), "--aligned"]
    controller += ["--transport", driver]
    worker += ["--transport", driver]
    environment: dict[str, str] = {TRANSPORT_VARIABLE: driver}
    if curve:
        for name in ("controller", "client", "worker"):
            create_keys(scratch, name)
        (scratch / "keyring.toml").write_text(_KEYRING)
        controller += ["--key", f"{scratch}/controller.key_secret", "--keyring", f"{scratch}/keyring.toml"]
        worker += ["--key", f"{scratch}/worker.key_secret", "--controller-key", f"{scratch}/controller.key"]
        environment |= {
            "ZFABRIC_KEY": f"{scratch}/client.key_secret",
            "ZFABRIC_CONTROLLER_KEY": f"{scratch}/controller.key",
        }
    if recorded:
        controller += ["--record", f"{scratch}/controller.rec"]
        worker += ["--record", f"{scratch}/worker.rec"]
    pages: list[str] = []
    for command in (controller, worker) if metrics else ():
        port = free_port()
        command += ["--metrics", str(port)]
        pages.append(f"http://127.0.0.1:{port}/metrics")
    beside = [
        Part(f"{CONTROLLER}-{number}", tuple(other if part == first else part for part in controller))
        for number, other in enumerate(others, start=2)
    ]
    parts = [Part(HOP, tuple(controller)), *beside, Part(WORKER, tuple(worker))]
    return Stack(parts, adapter, target, own_python(), environment, scratch, pages)


def fabric_of_two(rate: float = 0) -> Stack:
    """zfabric with two controllers: the client is at one of them, the worker at both."""
    return fabric(rate, controllers=2)


def fabric_of_three(rate: float = 0) -> Stack:
    """zfabric with three controllers."""
    return fabric(rate, controllers=3)


def fabric_cell(rate: float = 0) -> Stack:
    """zfabric whose worker is in a cell: a second controller between the one that the client knows and the worker."""
    parent, child = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    controller = (sys.executable, "-m", "zfabric.cli.controller", "--uvloop", "--endpoint")
    worker = (sys.executable, "-m", "zfabric.cli.worker", "--uvloop", "--backend", "echo", "--slots", "20000")
    paced = ("--tokens-per-second", str(rate), "--aligned") if rate else ()
    parts = [
        # A request that comes before the cell has told what it serves waits for that.
        Part(HOP, (*controller, parent)),
        Part(CELL, (*controller, child, "--recovery-ms", "0", "--parent", parent, "--cell", "cell")),
        Part(WORKER, (*worker, "--endpoint", child, "--name", "bench", *paced)),
    ]
    return Stack(parts, "fabric", parent, own_python())


def fabric_ipc(rate: float = 0) -> Stack:
    """zfabric over a Unix socket."""
    return fabric(rate, ipc=True)


def fabric_curve(rate: float = 0) -> Stack:
    """zfabric with every connection encrypted."""
    return fabric(rate, curve=True)


def fabric_recorded(rate: float = 0) -> Stack:
    """zfabric whose controller and worker keep flight recordings."""
    return fabric(rate, recorded=True)


def fabric_scraped(rate: float = 0) -> Stack:
    """zfabric whose controller and worker serve metrics."""
    return fabric(rate, metrics=True)


def fabric_asyncio(rate: float = 0) -> Stack:
    """zfabric with daemons on asyncio's own loop."""
    return fabric(rate, loop="--no-uvloop")


def beside(transport: Transport) -> str:
    """The subject that is zfabric with this driver at all three ends, in a run on another."""
    return f"zfabric {transport}"


def fabric_reader(rate: float = 0) -> Stack:
    """zfabric with all streams of its client read by one task."""
    return fabric(rate, adapter="fabric_reader")


def gateway(rate: float = 0) -> Stack:
    """zfabric behind its HTTP gateway, which is the hop; the controller is a role of its own."""
    python, port, driver = python_of("http"), free_port(), choose(None)
    target = f"tcp://127.0.0.1:{free_port()}"
    controller = ("zfabric.cli.controller", "--endpoint", target, "--recovery-ms", "0", "--transport", driver)
    worker: tuple[str, ...] = ("zfabric.cli.worker", "--endpoint", target, "--backend", "echo", "--transport", driver)
    worker += ("--slots", "20000", "--name", "bench")
    if rate:
        worker += ("--tokens-per-second", str(rate), "--aligned")
    door = ("zfabric.cli.gateway", "--endpoint", target, "--port", str(port), "--transport", driver)
    parts = [
        Part(role, (sys.executable, "-m", *command))
        for role, command in ((CONTROLLER, controller), (WORKER, worker), (HOP, door))
    ]
    return Stack(parts, "http", f"http://127.0.0.1:{port}", python)


def proxy() -> Stack:
    """The C proxy between bare peers."""
    front, back = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    parts = [
        Part(HOP, (sys.executable, "-m", "bench.servers.proxy", front, back)),
        Part(WORKER, (sys.executable, "-m", "bench.servers.bare_worker", back)),
    ]
    return Stack(parts, "bare", front, own_python())


def granian(
    python: Path, rate: float, *, application: str = "asgi_echo", role: str = WORKER, port: int = 0, **environment: str
) -> tuple[Part, str]:
    """An ASGI server, and its URL: Granian, written in Rust, which measured fastest of those for Python."""
    port = port or free_port()
    command: tuple[str, ...] = (str(python), "-m", "granian", "--interface", "asgi", "--host", "127.0.0.1")
    command += ("--port", str(port), "--loop", "uvloop", "--http", "1", "--no-ws", "--workers", "1")
    command += ("--log-level", "warning", "--backlog", "8192", f"bench.servers.{application}:app")
    url = f"http://127.0.0.1:{port}"
    given = {"ECHO_TOKENS_PER_SECOND": str(rate), "QUIET": "1", **environment}
    return Part(role, command, f"{url}/health", given), url


def http(rate: float = 0) -> Stack:
    """The ASGI server without anything in between."""
    python = python_of("http")
    worker, url = granian(python, rate)
    return Stack([worker], "http", url, python)


def _vllm_router(python: Path) -> tuple[str, ...]:
    return (str(python.parent / "vllm-router"),)


def _sglang_router(python: Path) -> tuple[str, ...]:
    return (str(python), "-m", "sglang_router.launch_router")


def _smg(python: Path) -> tuple[str, ...]:
    return (str(python.parent / "smg"), "launch")


def _router(program: Callable[[Path], tuple[str, ...]], rate: float, *, workers: int = 1, **environment: str) -> Stack:
    """One of the routers, which all descend from one and take the same flags."""
    python, own = python_of("http"), free_port()
    served = [
        granian(python, rate, role=WORKER if not number else f"{WORKER}-{number + 1}", port=free_port(), **environment)
        for number in range(workers)
    ]
    command = (*program(python), "--worker-urls", *(url for _, url in served), "--host", "127.0.0.1")
    command += ("--port", str(own), "--policy", "round_robin", "--log-level", "error")
    command += ("--prometheus-port", str(free_port()))
    target = f"http://127.0.0.1:{own}"
    hop = Part(HOP, command, f"{target}/v1/models", {"QUIET": "1"})
    return Stack([*(part for part, _ in served), hop], "http", target, python)


def vllm_router(rate: float = 0) -> Stack:
    """vLLM's router (Rust)."""
    return _router(_vllm_router, rate)


def vllm_router_pair(rate: float = 0, **environment: str) -> Stack:
    """The same with two workers."""
    return _router(_vllm_router, rate, workers=2, **environment)


def sglang_router(rate: float = 0) -> Stack:
    """SGLang's router (Rust)."""
    return _router(_sglang_router, rate)


def sglang_router_pair(rate: float = 0, **environment: str) -> Stack:
    """The same with two workers."""
    return _router(_sglang_router, rate, workers=2, **environment)


def smg(rate: float = 0) -> Stack:
    """Shepherd Model Gateway (Rust)."""
    return _router(_smg, rate)


def smg_pair(rate: float = 0, **environment: str) -> Stack:
    """The same with two workers."""
    return _router(_smg, rate, workers=2, **environment)


#: One client for all requests. By default LiteLLM makes one for each text completion, of which most is reading certificates:
#: 28 ms, 33 of them for a whole request.
_LITELLM_SESSION = """
import httpx, litellm
from litellm.integrations.custom_logger import CustomLogger

litellm.aclient_session = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))
handler = CustomLogger()
"""


def litellm(rate: float = 0) -> Stack:
    """LiteLLM's proxy (Python), one process as of the others."""
    python, own = python_of("litellm"), free_port()
    worker, url = granian(python_of("http"), rate)
    scratch = Path(tempfile.mkdtemp(prefix="zf-bench-"))
    place = {"model": "text-completion-openai/echo", "api_base": f"{url}/v1", "api_key": "none"}
    # YAML takes JSON.
    settings = {
        "model_list": [{"model_name": "echo", "litellm_params": place}],
        "litellm_settings": {"callbacks": ["session.handler"]},
        # Without keys, as all of them.
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    (scratch / "config.yaml").write_text(json.dumps(settings))
    (scratch / "session.py").write_text(_LITELLM_SESSION)
    command: tuple[str, ...] = (
        str(python.parent / "litellm"),
        "--config",
        f"{scratch}/config.yaml",
        "--host",
        "127.0.0.1",
    )
    command += ("--port", str(own), "--num_workers", "1")
    # Its table of prices is in the package, and would be fetched anew.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "QUIET": "1"}
    target = f"http://127.0.0.1:{own}"
    hop = Part(HOP, command, f"{target}/health/liveliness", environment)
    return Stack([worker, hop], "http", target, python_of("http"), scratch=scratch)


def fastchat(rate: float = 0, *, workers: int = 1, **environment: str) -> Stack:
    """FastChat's controller, streams passed through it."""
    python, own = python_of("fastchat"), free_port()
    controller = f"http://127.0.0.1:{own}"
    command = (str(python), "-m", "fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(own))
    scratch = Path(tempfile.mkdtemp(prefix="zf-bench-"))
    hop = Part(HOP, command, f"127.0.0.1:{own}", {"QUIET": "1", "LOGDIR": str(scratch)})
    parts = [hop]
    for number in range(workers):
        port = free_port()
        environment = {
            **environment, "FASTCHAT_CONTROLLER": controller, "FASTCHAT_OWN": f"http://127.0.0.1:{port}"
        }  # fmt: skip
        role = WORKER if not number else f"{WORKER}-{number + 1}"
        parts.append(granian(python, rate, application="fastchat_worker", role=role, port=port, **environment)[0])
    return Stack(parts, "fastchat", controller, python, scratch=scratch)


def fastchat_pair(rate: float = 0, **environment: str) -> Stack:
    """The same with two workers."""
    return fastchat(rate, workers=2, **environment)


def fabric_pair(rate: float = 0, **environment: str) -> Stack:
    """zfabric with two workers; with ECHO_ABORTS their aborts are noted."""
    target = f"tcp://127.0.0.1:{free_port()}"
    backend = "bench.servers.clocked_echo:ClockedEcho" if environment else "echo"
    controller = (sys.executable, "-m", "zfabric.cli.controller", "--endpoint", target)
    parts = [Part(HOP, controller)]
    for number in range(2):
        command: tuple[str, ...] = (sys.executable, "-m", "zfabric.cli.worker", "--endpoint", target)
        command += ("--backend", backend)
        command += ("--name", f"bench-{number}", "--tokens-per-second", str(rate), "--aligned")
        parts.append(Part(WORKER if not number else f"{WORKER}-2", command, "line", environment))
    return Stack(parts, "fabric", target, own_python())


def grpc(rate: float = 0) -> Stack:
    """gRPC's asyncio server and client, nothing in between."""
    python, port = python_of("rpc"), free_port()
    command = (str(python), "-m", "bench.servers.rpc_echo", str(port))
    worker = Part(WORKER, command, "line", {"ECHO_TOKENS_PER_SECOND": str(rate)})
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
    "zfabric cell": fabric_cell,
    "zfabric ipc": fabric_ipc,
    "zfabric curve": fabric_curve,
    "zfabric recorded": fabric_recorded,
    "zfabric of two": fabric_of_two,
    "zfabric of three": fabric_of_three,
    "zfabric asyncio": fabric_asyncio,
    "zfabric scraped": fabric_scraped,
    **{beside(transport): partial(fabric, transport=transport) for transport in TRANSPORTS},
    "zfabric reader": fabric_reader,
    "zfabric gateway": gateway,
    "zmq_proxy": proxy,
    "http": http,
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "smg": smg,
    "litellm": litellm,
    "fastchat": fastchat,
    "grpc": grpc,
    "nats": nats,
}
