"""What the three commands share: where settings come from, how errors leave, and the exit codes.

Settings: flags before environment (ZFABRIC_…) before a TOML file (--config, $ZFABRIC_CONFIG, or the user's own).
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration; 128 + its number after a signal, as shells have it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import cyclopts
from rich.console import Console

from zfabric.cli.settings import FileSettings, config_file
from zfabric.errors import (
    AccessError,
    ConfigurationError,
    ConnectionLostError,
    DeadlineExceededError,
    EndpointInUseError,
    FabricError,
    NameTakenError,
    NoWorkerError,
    OverloadError,
    UnknownModelError,
    VersionMismatchError,
)
from zfabric.version import __version__

_HINTS: Final[dict[type[FabricError], str]] = {
    AccessError: "$ZFABRIC_KEY and $ZFABRIC_CONTROLLER_KEY name the keys; the controller's keyring says what each may",
    ConnectionLostError: "is a controller running there? start one with: zfabric-controller",
    DeadlineExceededError: "the controller is busy or stopped, or the way to it is slow: try a longer --timeout",
    EndpointInUseError: "stop who listens there, or choose another --endpoint or --port",
    NameTakenError: "choose another --name, or wait until the other worker is gone",
    NoWorkerError: "zfabric workers lists who is registered; start one with: zfabric-worker",
    OverloadError: "try again later, or start another worker",
    UnknownModelError: "zfabric models lists what is served",
    VersionMismatchError: "update the older side",
}


def make_app(
    name: str, help_text: str, section: str, arguments: Sequence[str], shared: Collection[str] = ()
) -> cyclopts.App:
    """An app whose settings come from flags, ZFABRIC_{SECTION}_… and the file's [section].

    Args:
        shared: Keys of the section that only some of the program's commands take.
    """
    sources: list[Any] = [cyclopts.config.Env(f"ZFABRIC_{section.upper()}_", command=False)]
    path = config_file(arguments, section)
    if path is not None:
        sources.append(FileSettings(path, section, shared))
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
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Who read the output has enough. What is still buffered goes nowhere instead of failing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return result if isinstance(result, int) else 0


def hint_of(error: FabricError) -> str:
    """What helps against an error; "" where there is nothing to say beyond what it says."""
    return next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), "")


def report(error: FabricError, console: Console) -> int:
    """Say what went wrong and what helps. Returns the exit code."""
    console.print(f"error {error.code}: {error.message}", markup=False)
    hint = hint_of(error)
    if hint:
        console.print(f"hint: {hint}", markup=False)
    return 2 if isinstance(error, ConfigurationError) else 1
