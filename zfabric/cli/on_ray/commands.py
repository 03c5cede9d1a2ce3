"""zfabric ray: the processes of a fleet on the nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import cyclopts

from zfabric.cli.daemon import ready
from zfabric.cli.on_ray.actors import ActorSupervisor
from zfabric.cli.on_ray.cluster import CONTROLLER, FLEET, connect, found, make
from zfabric.cli.on_ray.finding import keep_endpoint
from zfabric.cli.on_ray.keeper import Order
from zfabric.cli.on_ray.manager import Manager, Request, Row, version
from zfabric.cli.on_ray.placing import Placed, RayPlan
from zfabric.cli.options import Json
from zfabric.cli.tables import Column, show
from zfabric.errors import ConfigurationError, WorkerTimeoutError
from zfabric.fleet.config import parse
from zfabric.fleet.limits import FLEET_STOP_MS, RAY_AGAIN_MS, RAY_ANSWER_MS, RAY_LOOK_MS, RAY_TOLD_MS, RAY_UP_S
from zfabric.version import __version__

Address = Annotated[
    str | None,
    cyclopts.Parameter(help="HOST:PORT of the cluster's head; $RAY_ADDRESS, else this host's cluster, by default."),
]
Namespace = Annotated[str, cyclopts.Parameter(help="Where the fleet's actors have their names; a fleet each.")]
_NAMESPACE: Final = "zfabric"
_COLUMNS: Sequence[Column] = (
    ("name", lambda row: row.name),
    ("state", lambda row: row.state),
    ("node", lambda row: row.node),
    ("pid", lambda row: row.pid),
    ("ended", lambda row: row.ends),
    ("serves", lambda row: row.fields.get("url") or row.fields.get("endpoint") or row.fields.get("models", "")),
    ("why", lambda row: row.why),
)


def ray_up(
    file: Path = Path("fleet.toml"),
    /,
    *,
    address: Address = None,
    namespace: Namespace = _NAMESPACE,
    timeout: Annotated[float, cyclopts.Parameter(help="Seconds to wait until all are ready.")] = RAY_UP_S,
    check: Annotated[bool, cyclopts.Parameter(negative=(), help="Only say whether the file can be used.")] = False,
) -> int:
    """Run a fleet on a Ray cluster, or change the one that runs there to what the file says.

    Each process is kept going by an actor, which Ray starts again on another node when its own is lost. Returns when all are
    ready; the fleet goes on by itself. Until then it says which process waits for what. Run again, it starts what is new,
    drains what is gone, and restarts workers whose table has changed one after the other.

    **Examples**

    `zfabric ray up` · `zfabric ray up fleet.toml --check` · `zfabric ray up fleet.toml --address 10.0.0.1:6379 --namespace chat`

    Args:
        file: The fleet's file; see docs/fleet.md.
    """
    text, plan = _read(file)
    if check:
        print(f"{file} can be used: {', '.join(command.name for command in plan.all())}")  # noqa: T201
        return 0
    connect(address, namespace)
    request = Request(text=text, directory=str(file.parent.resolve()), namespace=namespace)
    return asyncio.run(_up(request, timeout))


def ray_status(*, address: Address = None, namespace: Namespace = _NAMESPACE, as_json: Json = False) -> None:
    """Show the processes of a fleet on a Ray cluster: where they run, and what those wait for that do not.

    **Examples**

    `zfabric ray status` · `zfabric ray status --json`
    """
    connect(address, namespace)
    rows = asyncio.run(_rows(namespace))
    show(rows, _COLUMNS, as_json=as_json, empty="The fleet has no processes.")


def ray_endpoint(
    *,
    address: Address = None,
    namespace: Namespace = _NAMESPACE,
    follow: Annotated[
        Path | None, cyclopts.Parameter(help="Keep this file up to date with it instead, until Ctrl-C ends that.")
    ] = None,
) -> int:
    """Print the endpoint of a fleet's controller on a Ray cluster, or follow it when it moves to another node.

    A client of the endpoint file:///PATH reads the file for each try to connect.

    **Examples**

    `zfabric ray endpoint` · `zfabric ray endpoint --follow /run/zfabric/endpoint`
    """
    connect(address, namespace)
    if follow is not None:
        asyncio.run(keep_endpoint(namespace, follow.absolute()))
    print(asyncio.run(_endpoint(namespace)))  # noqa: T201
    return 0


def ray_down(*, address: Address = None, namespace: Namespace = _NAMESPACE) -> None:
    """Drain a fleet on a Ray cluster, and end it: its gateway, then its controller, then its workers.

    **Examples**

    `zfabric ray down` · `zfabric ray down --namespace chat`
    """
    connect(address, namespace)
    asyncio.run(_down(namespace))


def _read(file: Path) -> tuple[str, RayPlan]:
    """A fleet's file, as text and as a plan. Raises: ConfigurationError: It cannot be used; the message names the key."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}", path=str(file)) from error
    fleet = parse(text, str(file))
    try:
        plan = RayPlan(fleet, file.parent)
        plan.check()
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error.message}", path=str(file), **error.details) from error
    return text, plan


async def _up(request: Request, timeout_s: float) -> int:
    await _check_version()
    await _retire(request.namespace)
    manager = await _manager(request)
    until = time.monotonic() + timeout_s
    shown: dict[str, str] = {}
    while True:
        settled, trouble, rows = await _look(manager, request.namespace)
        waiting = [row for row in rows if row.state != "ready"]
        if settled and not waiting:
            break
        for name, text in {**{row.name: _how(row) for row in rows}, **({FLEET: trouble} if trouble else {})}.items():
            if shown.get(name) != text:
                shown[name] = text
                sys.stderr.write(f"{name}: {text}\n")
        if time.monotonic() > until:
            names = ", ".join(row.name for row in waiting) or FLEET
            raise WorkerTimeoutError(f"after {timeout_s:g} s these are not ready: {names}; they go on trying")
        await asyncio.sleep(RAY_LOOK_MS / 1_000)
    fields = {row.name: row.fields for row in rows}
    told = {"endpoint": fields.get(CONTROLLER, {}).get("endpoint"), "url": fields.get("gateway", {}).get("url")}
    ready(**{name: value for name, value in told.items() if value}, processes=len(rows))
    return 0


async def _check_version() -> None:
    """Raises: ConfigurationError: The nodes have no zfabric, or another one than this host."""
    import ray
    from ray.exceptions import RayError

    try:
        theirs = await ray.remote(version).options(num_cpus=0).remote()
    except RayError as error:
        raise ConfigurationError(f"the nodes cannot run zfabric: {_last_line(error)}") from error
    if theirs != __version__:
        raise ConfigurationError(f"the nodes have zfabric {theirs}, this host has {__version__}", version=theirs)


async def _look(manager: Any, namespace: str) -> tuple[bool, str, list[Row]]:
    """How far the actor of the fleet's file is, what stands in its way, and the processes.

    Raises:
        ConfigurationError: It is no more: it could not begin, or somebody has ended it.
    """
    from ray.exceptions import RayError

    try:
        settled, trouble = await manager.settled.remote()
        return settled, trouble, await manager.rows.remote()
    except RayError as error:
        if await found(FLEET, namespace) is None:
            raise ConfigurationError(f"the actor of the fleet's file has ended: {_last_line(error)}") from error
        # Its node is lost, and it will be on another one.
        return False, _last_line(error), []


def _how(row: Row) -> str:
    """How a process is, in words."""
    return f"{row.state}{f', {row.why}' if row.why else ''}{f' on {row.node}' if row.node else ''}"


def _last_line(error: Exception) -> str:
    """What an error of Ray's says, which has the traceback of another process before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


async def _manager(request: Request) -> Any:
    """A new actor for the fleet's file. That of the former one may take a moment to lose its name."""
    while True:
        try:
            return make(Manager, FLEET, request.namespace, request, num_cpus=0)
        except ValueError as error:
            if "already taken" not in str(error):
                raise
            await asyncio.sleep(RAY_AGAIN_MS / 1_000)


async def _retire(namespace: str) -> None:
    """End the actor that has the fleet's file, and none of the others."""
    import ray
    from ray.exceptions import RayError

    manager = await found(FLEET, namespace)
    if manager is None:
        return
    try:
        async with asyncio.timeout(RAY_ANSWER_MS / 1_000):
            await manager.retire.remote()
    except (TimeoutError, RayError):
        # It changes nothing either if it is not there.
        pass
    ray.kill(manager, no_restart=True)


async def _rows(namespace: str) -> list[Row]:
    manager = await found(FLEET, namespace)
    if manager is None:
        _nobody(namespace)
    rows: list[Row] = await _answered(manager.rows.remote(), "the actor of the fleet's file")
    return rows


async def _endpoint(namespace: str) -> str:
    actor = await found(CONTROLLER, namespace)
    if actor is None:
        _nobody(namespace)
    endpoint: str = await _answered(actor.endpoint_beside.remote(""), "the controller")
    return endpoint


async def _answered(reference: Any, of: str) -> Any:
    """What an actor answers. Raises: WorkerTimeoutError: It is on no node now."""
    from ray.exceptions import RayError

    try:
        async with asyncio.timeout((RAY_ANSWER_MS + RAY_TOLD_MS) / 1_000):
            return await reference
    except (TimeoutError, RayError) as error:
        raise WorkerTimeoutError(f"{of} does not answer: its node is lost, or it waits for one; try again") from error


async def _down(namespace: str) -> None:
    await _retire(namespace)
    supervisor = ActorSupervisor(_none, namespace, _tell, FLEET_STOP_MS / 1_000)
    await supervisor.adopt()
    await supervisor.stop()


def _none(command: Placed) -> Order:
    raise AssertionError(f"nothing is started any more, and {command.name} is")


def _tell(event: str, **fields: Any) -> None:
    if event == "child_stopped":
        sys.stderr.write(f"{fields['name']}: ended\n")


def _nobody(namespace: str) -> NoReturn:
    raise ConfigurationError(
        f"no fleet runs in the namespace {namespace!r} of this cluster; start one with: zfabric ray up",
        namespace=namespace,
    )
