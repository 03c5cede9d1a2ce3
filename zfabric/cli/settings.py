"""The settings file: which one, what is in it, and how it becomes defaults of a command's parser."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cyclopts

from zfabric.errors import ConfigurationError
from zfabric.transport.endpoints import ENDPOINT_VARIABLE

if TYPE_CHECKING:
    from cyclopts.argument import ArgumentCollection

CONFIG_VARIABLE: Final = "ZFABRIC_CONFIG"
#: The tables of the file. One file may hold the settings of everything on a host.
SECTIONS: Final = ("client", "controller", "gateway", "worker")


def config_file(arguments: Sequence[str], section: str) -> Path | None:
    """The file of --config, $ZFABRIC_{SECTION}_CONFIG or $ZFABRIC_CONFIG, else the user's own if there is one.

    Raises:
        ConfigurationError: A file was named and does not exist.
    """
    given = os.environ.get(f"ZFABRIC_{section.upper()}_CONFIG") or os.environ.get(CONFIG_VARIABLE)
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            given = arguments[position + 1]
        elif argument.startswith("--config="):
            given = argument.partition("=")[2]
    if given:
        if not _is_file(Path(given)):
            raise ConfigurationError(f"configuration file {given} does not exist, or cannot be read", path=given)
        return Path(given)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    home = Path(base) / "zfabric" / "zfabric.toml"
    return home if _is_file(home) else None


def _is_file(path: Path) -> bool:
    """Whether there is such a file that this user may see. A program may run as a user without a home, or in another's."""
    try:
        return path.is_file() and os.access(path, os.R_OK)
    except OSError:
        return False


#: (table, key) of what is passed over while a file is checked, since it was found to be wrong; no key for a whole table.
left_out: Final[ContextVar[frozenset[tuple[str, str]]]] = ContextVar("left_out", default=frozenset())


def read_tables(path: Path) -> dict[str, Any]:
    """All of a file. Raises: ConfigurationError, it cannot be read, or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}", path=str(path)) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", path=str(path)) from error


def read_section(path: Path, section: str) -> dict[str, Any]:
    """One table of the file, empty if it is not there.

    Raises:
        ConfigurationError: The file cannot be read, is not TOML, or holds something beside the known tables.
    """
    tables, passed = read_tables(path), left_out.get()
    for name, table in tables.items():
        if (name, "") not in passed and (name not in SECTIONS or not isinstance(table, dict)):
            known = ", ".join(f"[{known}]" for known in SECTIONS)
            raise ConfigurationError(f"{name!r} in {path} is not one of the tables {known}", path=str(path), key=name)
    found: dict[str, Any] = tables.get(section, {})
    return {key: value for key, value in found.items() if (section, key) not in passed}


class FileSettings:
    """A configuration source for cyclopts: one table of the file, read when a command is parsed, not for its --help.

    Args:
        path: The file.
        section: Its table.
        shared: Keys that some command of the program knows. One that the present command has no use for is left out
            instead of refused, since all commands of a program read the same table.
    """

    def __init__(self, path: Path, section: str, shared: Collection[str] = ()) -> None:
        self._path = path
        self._section = section
        self._shared = frozenset(shared)

    def __call__(self, app: cyclopts.App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        table = {
            key: value
            for key, value in read_section(self._path, self._section).items()
            if key not in self._shared or takes(arguments, key)
        }
        if os.environ.get(ENDPOINT_VARIABLE):
            # The environment goes before the file; without the key the default is looked up, which is this variable.
            table.pop("endpoint", None)
        source = cyclopts.config.Dict(
            {self._section: table},
            source=str(self._path),
            root_keys=(self._section,),
            use_commands_as_keys=False,
        )
        source(app, commands, arguments)


def takes(arguments: ArgumentCollection, key: str) -> bool:
    """Whether a command has a parameter of this name."""
    try:
        arguments.match("--" + key.replace("_", "-"))
    except ValueError:
        return False
    return True
