"""The actor that has the fleet's file: it makes the other actors what the file says, and follows its rules."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from zfabric.cli.fleet_run import KeptFleet
from zfabric.cli.logs import events, make_logger
from zfabric.cli.on_ray.actors import ActorSupervisor
from zfabric.cli.on_ray.cluster import found
from zfabric.cli.on_ray.finding import keep_endpoint
from zfabric.cli.on_ray.keeper import Order, Told
from zfabric.cli.on_ray.placing import Placed, RayPlan, lacking
from zfabric.fleet.config import parse
from zfabric.fleet.limits import RAY_MEND_MS, RAY_TOLD_MS
from zfabric.version import __version__


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `zfabric ray up` wants.

    Attributes:
        text: Of the fleet's file.
        directory: Where relative paths begin, and processes run, on all nodes.
        namespace: Where the fleet's actors have their names.
    """

    text: str
    directory: str
    namespace: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One process, as `zfabric ray status` shows it.

    Attributes:
        name: Of the process and of its actor.
        state: ready, starting, ending, or waiting for a node.
        node: The address of its node.
        pid: Of the process, on that node.
        ends: How often it has ended by itself since it is on that node.
        fields: What it told when it was ready, such as its endpoint or its models.
        why: What is known of why it is not ready.
    """

    name: str
    state: str
    node: str = ""
    pid: int = 0
    ends: int = 0
    fields: dict[str, str]
    why: str = ""


class Manager:
    """Runs as an actor, and has all its methods called on the actor's event loop."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._plan = RayPlan(parse(request.text, "fleet.toml"), Path(request.directory))
        common = self._plan.fleet.fleet
        self._log = events(make_logger("ray", common.log_level, common.log_format))
        self._supervisor: ActorSupervisor | None = None
        self._settled = False
        self._trouble = ""
        self._task = asyncio.create_task(self._run(), name="run")

    def _order(self, command: Placed) -> Order:
        fleet, request = self._plan.fleet, self._request
        return Order(
            command=command,
            namespace=request.namespace,
            finds=fleet.controller is not None,
            fleet=request.text,
            port=fleet.ray.port,
            stop_s=fleet.fleet.stop_ms / 1_000,
            log_level=fleet.fleet.log_level,
            log_format=fleet.fleet.log_format,
        )

    async def _run(self) -> None:
        """Have the fleet be as the file says, again and again."""
        while True:
            try:
                await self._settle()
            except Exception as error:  # noqa: BLE001 — whatever Ray raises, as while its head is away
                self._trouble = f"{type(error).__name__}: {error}"
                self._log("fleet_failed", error=self._trouble)
                await asyncio.sleep(RAY_MEND_MS / 1_000)

    async def _settle(self) -> None:
        """Take over what runs, change it to what the file says, and follow load and losses from then on."""
        common, namespace = self._plan.fleet.fleet, self._request.namespace
        supervisor = ActorSupervisor(self._order, namespace, self._log, common.stop_ms / 1_000)
        running = KeptFleet(self._plan, supervisor, self._log)
        tasks: list[asyncio.Task[None]] = []
        with tempfile.TemporaryDirectory(prefix="zfabric-ray-") as home:
            try:
                if self._plan.fleet.controller is not None:
                    file = Path(home) / "endpoint"
                    self._plan.endpoint = f"file://{file}"
                    tasks.append(asyncio.create_task(keep_endpoint(namespace, file), name="endpoint"))
                await supervisor.adopt()
                self._supervisor = supervisor
                # With the same care as `zfabric up` has at SIGHUP.
                await running.change(self._plan)
                self._settled, self._trouble = True, ""
                tasks.append(asyncio.create_task(running.follow(), name="follow"))
                while True:
                    await asyncio.sleep(RAY_MEND_MS / 1_000)
                    await supervisor.mend()
            finally:
                for task in tasks:
                    task.cancel()

    async def retire(self) -> None:
        """Do nothing any more: another one takes over, or all is ended."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def settled(self) -> tuple[bool, str]:
        """Whether all that was not as the file says has been changed, and what stands in the way."""
        return self._settled, self._trouble

    async def rows(self) -> list[Row]:
        """All processes that there are to be."""
        commands = self._supervisor.commands if self._supervisor is not None else {}
        rows = await asyncio.gather(
            *(self._row(command) for command in commands.values() if isinstance(command, Placed))
        )
        return sorted(rows, key=lambda row: row.name)

    async def _row(self, command: Placed) -> Row:
        from ray.exceptions import RayError

        actor = await found(command.name, self._request.namespace)
        if actor is not None:
            try:
                async with asyncio.timeout(RAY_TOLD_MS / 1_000):
                    told: Told = await actor.told.remote()
            except (TimeoutError, RayError):
                pass
            else:
                return Row(
                    name=command.name, state=told.state, node=told.node, pid=told.pid, ends=told.ends,
                    fields=told.fields, why=told.why,
                )  # fmt: skip
        return Row(name=command.name, state="waiting", fields={}, why=await asyncio.to_thread(_why, command))


def version() -> str:
    """Of zfabric, where this runs."""
    return __version__


def _why(command: Placed) -> str:
    """Why Ray may not have put an actor on a node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return lacking(command.placement, nodes, ray.available_resources())
