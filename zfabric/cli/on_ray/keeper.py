"""The actor of one process of a fleet: it runs the process on its node, keeps it going, and drains it."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from zfabric.backends.vllm_engine.compat.placement import GROUP_VARIABLE, NAMESPACE_VARIABLE
from zfabric.cli.logs import LogFormat, LogLevel, events, make_logger
from zfabric.cli.on_ray.cluster import CONTROLLER
from zfabric.cli.on_ray.finding import keep_endpoint, write
from zfabric.cli.on_ray.placing import Placed
from zfabric.cli.supervise import Supervisor
from zfabric.fleet.limits import RAY_WAIT_MS, RESTART_MAX_MS
from zfabric.transport.endpoints import tcp_endpoint


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an actor is to run.

    Attributes:
        command: The process.
        namespace: Where the fleet's actors have their names.
        finds: Whether the process has to find the controller, or is the controller, whose endpoint is not known yet.
        fleet: The text of the fleet's file, in which a controller finds rules.
        port: Of the controller; 0 for a free one.
        stop_s: How long the process may drain.
        log_level, log_format: Of the actor's own lines.
    """

    command: Placed
    namespace: str
    finds: bool
    fleet: str
    port: int
    stop_s: float
    log_level: LogLevel
    log_format: LogFormat


@dataclass(frozen=True, kw_only=True)
class Told:
    """What an actor says of its process.

    Attributes:
        state: starting, ready, ending, or ended for good.
        node: The address of its node.
        pid: Of the process, 0 before the first.
        fields: What it told when it was ready.
        ends: How often it has ended by itself since this actor was started.
        why: What is known of why it is not ready.
    """

    state: str
    node: str
    pid: int
    fields: dict[str, str]
    ends: int
    why: str


class Keeper:
    """Runs as an actor, and has all its methods called on the actor's event loop."""

    def __init__(self, order: Order) -> None:
        import ray

        self._order = order
        self._name = order.command.name
        self._node: str = ray.util.get_node_ip_address()
        # What the process starts itself, as an engine that runs on Ray, connects to the same cluster.
        self._cluster: str = ray.get_runtime_context().gcs_address
        self._home = Path(tempfile.mkdtemp(prefix="zfabric-ray-"))
        self._log = events(make_logger("ray", order.log_level, order.log_format))
        self._supervisor = Supervisor(self._heard, order.stop_s)
        self._endpoint = ""
        self._ends = 0
        self._why = ""
        self._tried = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(self._run(), name="run")]

    def _heard(self, event: str, **fields: object) -> None:
        if event == "child_ended":
            self._ends += 1
        self._log(event, node=self._node, **fields)

    async def _run(self) -> None:
        """Start the process as soon as the node has what it needs."""
        order, command = self._order, self._order.command
        arguments: tuple[str, ...] = ()
        if order.finds:
            if self._name == CONTROLLER:
                # It keeps its port when its process ends and is started again.
                self._endpoint = tcp_endpoint(self._node, order.port or _free_port(self._node))
                rules = self._home / "fleet.toml"
                write(rules, order.fleet)
                arguments = ("--endpoint", self._endpoint, "--fleet", str(rules))
            else:
                file = self._home / "endpoint"
                self._tasks.append(asyncio.create_task(keep_endpoint(order.namespace, file), name="endpoint"))
                arguments = ("--endpoint", f"file://{file}")
        environment = {"RAY_ADDRESS": self._cluster, **command.environment}
        if command.placement.bundles:
            environment |= {GROUP_VARIABLE: self._name, NAMESPACE_VARIABLE: order.namespace}
        made = dataclasses.replace(command, arguments=(*arguments, *command.arguments), environment=environment)
        while not self._has_directory(made):
            self._tried.set()
            await asyncio.sleep(RESTART_MAX_MS / 1_000)
        self._why = ""
        await self._supervisor.keep(made).wait()
        self._tried.set()

    def _has_directory(self, command: Placed) -> bool:
        """Whether the process can be started where it is to run."""
        if command.directory is not None and not command.directory.is_dir():
            self._why = f"there is no directory {command.directory} on {self._node}; [ray] directory names another"
            self._log("node_lacks", name=self._name, error=self._why)
            return False
        if command.log is not None:
            try:
                command.log.parent.mkdir(parents=True, exist_ok=True)
                command.log.touch()
            except OSError as error:
                self._why = f"{command.log} cannot be written on {self._node}: {error}"
                self._log("node_lacks", name=self._name, error=self._why)
                return False
        return True

    async def order(self) -> Order:
        """What it runs."""
        return self._order

    async def endpoint_beside(self, known: str) -> str:
        """Of the controller's actor: its endpoint, at once if it is another one. It stays the same as long as the actor is on
        this node, so whoever knows it waits until this call ends or fails, and asks again."""
        if self._endpoint == known:
            await asyncio.sleep(RAY_WAIT_MS / 1_000)
        return self._endpoint

    async def tried(self) -> None:
        """Wait until the process is ready, or has ended without."""
        await self._tried.wait()

    async def told(self) -> Told:
        """How the process is."""
        child = self._supervisor.child(self._name)
        fields = child.told if child is not None else None
        state = "starting" if fields is None else "ready"
        if self._stopping is not None:
            state = "ended" if self._stopping.done() else "ending"
        why = self._why
        if state == "starting" and child is not None and self._ends:
            why = f"it has ended {self._ends} times: {child.last_line or 'see its log'}"
        if fields is not None and self._endpoint:
            fields = {**fields, "endpoint": self._endpoint}
        pid = child.pid if child is not None else 0
        return Told(state=state, node=self._node, pid=pid, fields=fields or {}, ends=self._ends, why=why)

    async def hang_up(self, fleet: str, *, anyway: bool = True) -> None:
        """Have the process read its files anew.

        Args:
            fleet: The text of the fleet's file now, in which a controller finds rules.
            anyway: Also where that is what it has already.
        """
        rules = self._home / "fleet.toml"
        is_new = rules.exists() and rules.read_text(encoding="utf-8") != fleet
        if is_new:
            write(rules, fleet)
        child = self._supervisor.child(self._name)
        if (anyway or is_new) and child is not None and child.is_ready:
            self._supervisor.hang_up([self._name])

    async def stop(self) -> None:
        """Have the process drain, and return when it has ended. Asked again, it goes on doing so."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="stop")
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        run, *finding = self._tasks
        run.cancel()
        await self._supervisor.remove(self._name)
        # Until then the process may have to find the controller.
        for task in finding:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self._home, ignore_errors=True)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        port: int = taken.getsockname()[1]
        return port
