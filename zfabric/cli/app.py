"""What the three commands share: where settings come from, how errors leave, and the exit codes.

Settings: flags before environment (ZFABRIC_…) before a TOML file (--config, $ZFABRIC_CONFIG, or the user's own).
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import cyclopts
from rich.console import Console

from zfabric.errors import ConfigurationError, ConnectionLostError, EndpointInUseError, FabricError, NameTakenError
from zfabric.version import __version__

CONFIG_VARIABLE: Final = "ZFABRIC_CONFIG"
_HINTS: Final[dict[type[FabricError], str]] = {
    ConnectionLostError: "is a controller running there? start one with: zfabric-controller",
    EndpointInUseError: "stop the other controller, or choose another --endpoint",
    NameTakenError: "choose another --name, or wait until the other worker is gone",
}


def config_file(arguments: Sequence[str]) -> Path | None:
    """The file of --config or $ZFABRIC_CONFIG, else the user's own if there is one.

    Raises:
        ConfigurationError: A file was named and does not exist.
    """
    given = os.environ.get(CONFIG_VARIABLE)
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            given = arguments[position + 1]
        elif argument.startswith("--config="):
            given = argument.partition("=")[2]
    if given:
        if not Path(given).is_file():
            raise ConfigurationError(f"configuration file {given} does not exist", path=given)
        return Path(given)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "zfabric" / "zfabric.toml"
    return home if home.is_file() else None


def make_app(name: str, help_text: str, section: str, arguments: Sequence[str]) -> cyclopts.App:
    """An app whose settings come from flags, ZFABRIC_{SECTION}_… and the file's [section]."""
    sources: list[Any] = [cyclopts.config.Env(f"ZFABRIC_{section.upper()}_", command=False)]
    path = config_file(arguments)
    if path is not None:
        sources.append(cyclopts.config.Toml(path, root_keys=(section,), use_commands_as_keys=False, must_exist=True))
    return cyclopts.App(
        name=name,
        help=help_text,
        help_format="markdown",
        version=__version__,
        config=sources,
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )


def run_app(build: Callable[[list[str]], cyclopts.App], arguments: Sequence[str] | None) -> int:
    """Parse, run, and turn whatever comes out into an exit code and a sentence."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        result = build(given)(given)
    except FabricError as error:
        return report(error, console)
    except cyclopts.CycloptsError as error:
        # A configuration's own check raises FabricError, which cyclopts wraps.
        cause = error.__cause__
        if isinstance(cause, FabricError):
            return report(cause, console)
        console.print(f"error: {error}".strip(), markup=False)
        console.print("try --help", markup=False)
        return 2
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def report(error: FabricError, console: Console) -> int:
    """Say what went wrong and what helps. Returns the exit code."""
    console.print(f"error {error.code}: {error.message}", markup=False)
    for kind, hint in _HINTS.items():
        if isinstance(error, kind):
            console.print(f"hint: {hint}", markup=False)
    return 2 if isinstance(error, ConfigurationError) else 1
