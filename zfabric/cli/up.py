"""zfabric up: all processes of a fleet on one host, as its file describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from zfabric.cli.daemon import ready, run
from zfabric.cli.fleet import Plan
from zfabric.cli.fleet_run import Told, run_fleet
from zfabric.cli.logs import events, make_logger
from zfabric.errors import ConfigurationError
from zfabric.fleet.config import load


def up(
    file: Path = Path("fleet.toml"),
    /,
    *,
    check: Annotated[bool, cyclopts.Parameter(negative=(), help="Only say whether the file can be used.")] = False,
) -> int:
    """Run a fleet on this host: a controller, workers and a gateway, kept going until Ctrl-C or SIGTERM.

    They are started in order: the controller, the workers when it listens, the gateway when their models are loaded. One that
    ends is started again, after 0.25 s and up to 30 s. SIGHUP reads the file anew and changes what has changed. SIGTERM and
    Ctrl-C drain one after the other; a second one ends all at once. If this process is killed, the others are killed too.

    **Examples**

    `zfabric up` · `zfabric up /etc/zfabric/fleet.toml` · `zfabric up fleet.toml --check`

    Args:
        file: The fleet's file; see docs/fleet.md.
    """
    plan = _read(file)
    if check:
        print(f"{file} can be used: {_counted(plan)}")  # noqa: T201
        return 0
    return run(_up(file, plan), use_uvloop=False)


def _read(file: Path) -> Plan:
    """Raises: ConfigurationError: The file cannot be used; the message names the key."""
    plan = Plan(load(file), file.parent, file.name)
    try:
        plan.check()
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error.message}", path=str(file), **error.details) from error
    logs = plan.fleet.fleet.logs
    if logs is not None and not (file.parent / logs).is_dir():
        raise ConfigurationError(f"{file}: fleet.logs: {logs} is no directory", key="fleet.logs")
    return plan


async def _up(file: Path, plan: Plan) -> int:
    common = plan.fleet.fleet
    # Flags of the whole process stay as they are; SIGHUP changes those of its children.
    log = events(make_logger("up", common.log_level, common.log_format))

    async def on_ready(told: Told) -> None:
        shown = {"endpoint": plan.endpoint}
        if "gateway" in told:
            shown["url"] = told["gateway"]["url"]
        ready(**shown, processes=len(told))

    return await run_fleet(plan, log, on_ready, lambda: _read(file))


def _counted(plan: Plan) -> str:
    """What would be started, by name."""
    return ", ".join(command.name for command in plan.all())
