"""A fleet's file as commands for a supervisor, and whether the programs would take them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

import cyclopts

from zfabric.cli import controller, gateway, worker
from zfabric.cli.check import fault_of
from zfabric.cli.children import Command
from zfabric.cli.daemon import only_checked
from zfabric.cli.worker import segments
from zfabric.errors import ConfigurationError, FabricError
from zfabric.fleet.config import Fleet, Group, Settings
from zfabric.transport.endpoints import check_endpoints, default_endpoint

#: Which program a process runs, and who ends before whom. The gateway takes no more callers first, and the controller no more
#: requests next, while workers are still there for those that wait.
GATEWAY_STAGE, CONTROLLER_STAGE, WORKER_STAGE = range(3)
_BUILD: Final[dict[str, Callable[[list[str]], cyclopts.App]]] = {
    "zfabric.cli.controller": controller.build,
    "zfabric.cli.gateway": gateway.build,
    "zfabric.cli.worker": worker.build,
}


class Plan:
    """A fleet's processes as commands.

    Args:
        fleet: What its file says.
        directory: Where the processes run, and where relative paths of the file begin.
        file: The fleet's file, there, where the controller finds rules for the number of workers.
        prefixed: Whether lines of the processes stand behind their names, where they have no log files.
        finding: Whether whoever starts the processes tells them the controller's endpoint, which is not known here.

    Attributes:
        endpoint: The controller's.
    """

    def __init__(
        self, fleet: Fleet, directory: Path, file: str = "", *, prefixed: bool = True, finding: bool = False
    ) -> None:
        self.fleet = fleet
        self._file = file
        self._prefixed = prefixed
        self.endpoint = "" if finding else check_endpoints(fleet.fleet.endpoint or default_endpoint())
        self._directory = directory
        common = fleet.fleet
        # A child's own standard error is never a terminal.
        terminal = common.log_format == "auto" and common.logs is None and sys.stderr.isatty()
        form = "console" if terminal else common.log_format
        shared = [] if finding else ["--endpoint", self.endpoint]
        shared += ["--log-level", common.log_level, "--log-format", form]
        self._shared = (*shared, *([] if common.config is None else ["--config", common.config]))

    def controller(self) -> Command | None:
        """The controller's command, if there is one."""
        settings = self.fleet.controller
        rules = ["--fleet", self._file] if self._file else []
        return None if settings is None else self._command("controller", CONTROLLER_STAGE, settings, *rules)

    def gateway(self) -> Command | None:
        """The gateway's command, if there is one."""
        settings = self.fleet.gateway
        return None if settings is None else self._command("gateway", GATEWAY_STAGE, settings)

    def workers(self, present: Collection[str] = ()) -> list[Command]:
        """Those of the workers that there are at first. Args: present: Names of those that there are already, which stay where
        the number of a group follows the load."""
        found = []
        for name, group in self.fleet.workers.items():
            numbers = range(group.most)
            kept = [n for n in numbers if self.name_of(name, n) in present] if group.scale is not None else []
            more = [n for n in numbers if n not in kept]
            found += [self.worker(name, n) for n in sorted(kept + more[: max(0, group.least - len(kept))])]
        return found

    def name_of(self, group: str, number: int) -> str:
        """What one of a group's workers is called."""
        return f"{self.fleet.fleet.prefix}{group}-{number + 1}"

    def worker(self, name: str, number: int) -> Command:
        """One of a group's workers, by its number from 0."""
        group: Group = self.fleet.workers[name]
        environment = dict(group.environment)
        if group.devices:
            environment["CUDA_VISIBLE_DEVICES"] = group.devices[number]
        called = self.name_of(name, number)
        return self._command(
            called, WORKER_STAGE, group.settings, "--name", called, of="worker", arguments=group.arguments,
            environment=environment,
        )  # fmt: skip

    def all(self, present: Collection[str] = ()) -> list[Command]:
        """All that there are at first, in the order in which they need one another. Args: present: See `workers`."""
        return [it for it in (self.controller(), *self.workers(present), self.gateway()) if it is not None]

    def check(self) -> None:
        """Have the programs parse their command lines, as at their start.

        Raises:
            ConfigurationError: One would not take it; the message names the table and the key.
        """
        for table, command in self._each():
            token = only_checked.set(True)
            given = list(command.arguments)
            try:
                with contextlib.chdir(self._directory):
                    _BUILD[command.module](given)(segments(given)[0])
            except cyclopts.CycloptsError as error:
                key, why = fault_of(error)
                raise ConfigurationError(f"{table}{'.' if key else ''}{key}: {why}", key=key or table) from error
            except FabricError as error:
                raise ConfigurationError(f"{table}: {error.message}", key=table) from error
            finally:
                only_checked.reset(token)

    def _each(self) -> Iterator[tuple[str, Command]]:
        """Every table of settings, and a command that has them."""
        for name, command in (("controller", self.controller()), ("gateway", self.gateway())):
            if command is not None:
                yield name, command
        for name in self.fleet.workers:
            yield f"workers.{name}.settings", self.worker(name, 0)

    def _command(
        self,
        name: str,
        stage: int,
        settings: Settings,
        *own: str,
        of: str = "",
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> Command:
        logs = self.fleet.fleet.logs
        return Command(
            name=name,
            module=f"zfabric.cli.{of or name}",
            arguments=(*self._shared, *own, *flags_of(settings), *arguments),
            environment=environment or {},
            directory=self._directory,
            log=None if logs is None else self._directory / logs / f"{name}.log",
            prefixed=self._prefixed,
            stage=stage,
        )


def flags_of(settings: Settings) -> list[str]:
    """A table of settings as a command line has it.

    Example:
        >>> flags_of({"slots": 4, "beats": False, "model_names": ["a", "b"]})
        ['--slots', '4', '--no-beats', '--model-names', 'a', '--model-names', 'b']
    """
    flags: list[str] = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            for one in value if isinstance(value, list) else [value]:
                flags += [f"--{name}", _text(key, one)]
    return flags


def _text(key: str, value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise ConfigurationError(f"{key}: it must be text, a number, true or false, or a list of those", key=key)
    return os.fspath(value) if isinstance(value, str) else str(value)
