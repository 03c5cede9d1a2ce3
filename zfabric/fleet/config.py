"""A fleet as its file describes it: which processes there are, with which settings, and how many workers of each kind."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from zfabric.core.controller.scaling import Rule
from zfabric.errors import ConfigurationError
from zfabric.fleet.limits import FLEET_REPLICAS_MAX, FLEET_STOP_MS
from zfabric.fleet.needs import OnRay, WorkerNeeds
from zfabric.limits import DEADLINE_MAX_MS

#: A group's name becomes part of its workers' names, of file names, and of what stands before lines.
_GroupName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=FLEET_REPLICAS_MAX)]
Settings = dict[str, Any]
#: What a fleet says itself, so that no table of settings may.
_OF_THE_FLEET: Final = ("config", "log_level", "log_format")


class Common(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The table [fleet]: what holds for all processes.

    Attributes:
        endpoint: The controller's; by default $ZFABRIC_ENDPOINT, else this user's own socket.
        config: A settings file for all; what stands in the fleet's own file goes before it.
        logs: A directory with a log file for each process; without it, lines go to standard error behind the process's name.
        log_level, log_format: Of all processes.
        prefix: Stands before the names of the workers, so that several hosts can join one controller.
        stop_ms: How long all of it may take to end.
    """

    endpoint: str | None = None
    config: str | None = None
    logs: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    prefix: str = ""
    stop_ms: Annotated[int, msgspec.Meta(ge=1, le=DEADLINE_MAX_MS)] = FLEET_STOP_MS


class Group(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A table [workers.NAME]: workers of one kind.

    Attributes:
        replicas: How many there are; one, unless `scale` says how many.
        scale: The rule by which their number follows the load of their model.
        settings: Those of zfabric-worker and of its backend.
        arguments: What else stands on its command line, for a backend that parses its own.
        environment: Variables of the process.
        devices: For each replica, the GPUs that it may see (CUDA_VISIBLE_DEVICES).
        ray: What each needs on a Ray cluster.
    """

    replicas: _Count | None = None
    scale: Rule | None = None
    settings: Settings = {}
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    devices: tuple[str, ...] = ()
    ray: WorkerNeeds = WorkerNeeds()

    @property
    def least(self) -> int:
        """Replicas that there are at first."""
        if self.scale is not None:
            return self.scale.min
        return 1 if self.replicas is None else self.replicas

    @property
    def most(self) -> int:
        """Replicas that there can be at a time."""
        return self.least if self.scale is None else self.scale.max


class Fleet(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All of a fleet on one host.

    Attributes:
        fleet: What holds for all processes.
        controller: Settings of zfabric-controller; without the table there is none, and the workers join another host's.
        gateway: Settings of zfabric-gateway; without the table there is none.
        workers: Groups of workers by name.
        ray: What holds on a Ray cluster.
    """

    fleet: Common = Common()
    controller: Settings | None = None
    gateway: Settings | None = None
    workers: dict[_GroupName, Group] = {}
    ray: OnRay = OnRay()

    @property
    def rules(self) -> list[Rule]:
        """How many replicas models should have."""
        return [group.scale for group in self.workers.values() if group.scale is not None]

    def check(self) -> None:
        """Raises: ConfigurationError: What stands at one place contradicts what stands at another."""
        if self.controller is None and self.gateway is None and not self.workers:
            raise _wrong("controller", "the fleet has no process: it needs [controller], [gateway] or [workers.NAME]")
        tables = {"controller": self.controller or {}, "gateway": self.gateway or {}}
        tables |= {f"workers.{name}.settings": group.settings for name, group in self.workers.items()}
        for table, settings in tables.items():
            own = [*_OF_THE_FLEET, *(["endpoint", "name"] if table.startswith("workers") else [])]
            own += ["endpoint"] if table == "gateway" else []
            for key in own:
                if key in settings:
                    raise _wrong(f"{table}.{key}", "this is said for the whole fleet, in the table [fleet]")
        models = [rule.model for rule in self.rules]
        for name, group in self.workers.items():
            if group.scale is not None and group.replicas is not None:
                raise _wrong(f"workers.{name}.replicas", "scale says how many there are")
            if group.scale is not None and models.count(group.scale.model) > 1:
                raise _wrong(f"workers.{name}.scale.model", f"two groups have rules for {group.scale.model!r}")
            if group.devices and len(group.devices) < group.most:
                key = f"workers.{name}.devices"
                raise _wrong(key, f"it names devices of {len(group.devices)} replicas, there can be {group.most}")


def load(path: Path) -> Fleet:
    """Read a fleet's file.

    Raises:
        ConfigurationError: It cannot be read, is not TOML, or a key is not as it should be; the message names the key.

    Example:
        >>> load(Path("fleet.toml")).workers["echo"].replicas
        2
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", path=str(path)) from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Fleet:
    """What the text of a fleet's file says. Args: name: The file's, for errors, which are those of `load`."""
    try:
        tables = tomllib.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{name} cannot be read: {error}", path=name) from error
    try:
        fleet = msgspec.convert(tables, Fleet)
        fleet.check()
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{name}: {_told(str(error), tables)}", path=name) from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error.message}", path=name, **error.details) from error
    return fleet


def _told(message: str, tables: dict[str, Any]) -> str:
    """What msgspec says, with the key first: it says `… - at `$.workers[...].replicas``, and no name of a table in a table."""
    what, _, place = message.partition(" - at ")
    what = what.replace("`", '"')
    keys = place.strip("`").removeprefix("$").removeprefix(".")
    if "workers[...]" in keys:
        for name, table in tables.get("workers", {}).items():
            try:
                msgspec.convert({"workers": {name: table}}, Fleet)
            except msgspec.ValidationError as error:
                if str(error) == message:
                    keys = keys.replace("workers[...]", f"workers.{name}")
                    break
    return f"{keys}: {what}" if keys else what


def _wrong(key: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"{key}: {why}", key=key)
