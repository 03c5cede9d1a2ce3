"""zfabric check: a settings file as the programs would read it, without starting any of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import cyclopts

from zfabric.cli import controller, gateway, worker
from zfabric.cli.daemon import only_checked
from zfabric.cli.findings import Finding, has_errors, show_findings
from zfabric.cli.options import Json
from zfabric.cli.settings import SECTIONS, left_out, read_tables, takes
from zfabric.controller.keyring import KeyRing
from zfabric.errors import ConfigurationError, FabricError
from zfabric.transport.curve import load_public, load_secret
from zfabric.transport.endpoints import check_endpoints

#: Settings that name files which are read at the start, and how each is read.
_FILES: Final[dict[str, Callable[[Path], object]]] = {
    "key": load_secret,
    "controller_key": load_public,
    "keyring": KeyRing.load,
}
_DAEMONS: Final[dict[str, Callable[[list[str]], cyclopts.App]]] = {
    "controller": controller.build,
    "gateway": gateway.build,
    "worker": worker.build,
}
#: Wrong values of one table that are told: each costs another look at the whole.
_VALUES_MAX: Final = 50


def check(
    file: Annotated[Path, cyclopts.Parameter(help="The TOML file.")],
    /,
    *,
    as_json: Json = False,
) -> int:
    """Check a settings file: its tables, keys, values, endpoints, and the key files that it names. Nothing is started.

    The exit code is 0 if all programs would take it, and 2 if one would not.

    **Examples**

    `zfabric check /etc/zfabric/zfabric.toml` · `zfabric check zfabric.toml --json`
    """
    findings = check_file(file)
    show_findings(findings, as_json=as_json)
    return 2 if has_errors(findings) else 0


def check_file(path: Path) -> list[Finding]:
    """All that is wrong with a file, and that its other tables are fine."""
    try:
        tables = read_tables(path)
    except ConfigurationError as error:
        return [Finding("error", str(path), error.message, "see docs/operating.md for the file's form")]
    findings: list[Finding] = []
    for name, table in tables.items():
        if name not in SECTIONS or not isinstance(table, dict):
            close = difflib.get_close_matches(name, SECTIONS, n=1)
            advice = f"did you mean [{close[0]}]?" if close else f"tables are {', '.join(f'[{it}]' for it in SECTIONS)}"
            findings.append(Finding("error", f"[{name}]", "there is no such table", advice))
    wrong = {name for name in tables if name not in SECTIONS or not isinstance(tables[name], dict)}
    token = left_out.set(frozenset((name, "") for name in wrong))
    try:
        for name, table in tables.items():
            if name not in wrong:
                found = list(_check_table(path, name, table))
                findings += found or [Finding("fine", f"[{name}]", f"{len(table)} settings")]
    finally:
        left_out.reset(token)
    return findings or [Finding("warning", str(path), "it has no tables", "all settings are defaults")]


def _check_table(path: Path, name: str, table: dict[str, Any]) -> Iterator[Finding]:
    known = _client_keys() if name == "client" else _keys_of(_DAEMONS[name], path)
    if known is None:
        # What the table's backend takes is only known to the backend.
        unknown: set[str] = set()
    else:
        unknown = {key for key in table if key not in known}
    for key in sorted(unknown):
        close = difflib.get_close_matches(key, known or (), n=1)
        yield Finding(
            "error", f"[{name}] {key}", "there is no such setting", f"did you mean {close[0]}?" if close else ""
        )
    yield from _check_values(path, name, unknown)
    yield from _check_files(name, table)


def _keys_of(build: Callable[[list[str]], cyclopts.App], path: Path) -> set[str] | None:
    """The settings that a daemon takes; None where its backend takes whatever it likes."""
    try:
        app = build(["--config", str(path)])
    except FabricError:
        return None
    arguments = app.assemble_argument_collection(parse_docstring=False)
    if any(argument.field_info.kind is inspect.Parameter.VAR_POSITIONAL for argument in arguments):
        return None
    return {
        name.removeprefix("--").replace("-", "_")
        for argument in arguments
        for name in argument.names
        if takes(arguments, name.removeprefix("--"))
    }


def _client_keys() -> set[str]:
    from zfabric.cli.main import client_options  # which has this command among its own

    return client_options()


def _check_values(path: Path, section: str, unknown: set[str]) -> Iterator[Finding]:
    """Have the programs parse the table as at their start, again and again without what was found to be wrong."""
    skipped = {(section, key) for key in unknown}
    before = left_out.get()
    for _ in range(_VALUES_MAX):
        token, checked = left_out.set(before | skipped), only_checked.set(True)
        try:
            _parse(path, section)
            return
        except cyclopts.CycloptsError as error:
            key, told = fault_of(error)
            yield Finding("error", f"[{section}] {key}".strip(), told)
            if not key or (section, key) in skipped:
                return
            skipped.add((section, key))
        except FabricError as error:
            yield Finding("error", f"[{section}] {error.details.get('parameter', '')}".strip(), error.message)
            return
        finally:
            left_out.reset(token)
            only_checked.reset(checked)


def fault_of(error: cyclopts.CycloptsError) -> tuple[str, str]:
    """Which setting a parser does not take, "" where it names none, and why."""
    argument = getattr(error, "argument", None)
    key = argument.name.removeprefix("--").replace("-", "_") if argument is not None else ""
    cause = error.__cause__
    return key, cause.message if isinstance(cause, FabricError) else str(error).strip().replace("\n", " ")


def _parse(path: Path, section: str) -> None:
    """As a daemon does at its start, or as commands of `zfabric` do. Raises: FabricError, CycloptsError."""
    given = ["--config", str(path)]
    if section != "client":
        _DAEMONS[section](given)(given)
        return
    from zfabric.cli.main import build, client_commands

    app = build(given)
    for words, command in client_commands():
        parameters = inspect.signature(command).parameters.values()
        needed = [
            "x"
            for parameter in parameters
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and parameter.default is inspect.Parameter.empty
        ]
        if "config" in inspect.signature(command).parameters:
            app.parse_args([*words, *needed, *given])


def _check_files(section: str, table: dict[str, Any]) -> Iterator[Finding]:
    """The files that the table names, and the client's endpoint, which no program reads before it is used."""
    for key, load in _FILES.items():
        if isinstance(table.get(key), str):
            try:
                load(Path(table[key]))
            except ConfigurationError as error:
                yield Finding("error", f"[{section}] {key}", error.message, _advice(error))
    if section == "client" and isinstance(table.get("endpoint"), str):
        try:
            check_endpoints(table["endpoint"])
        except ConfigurationError as error:
            yield Finding("error", "[client] endpoint", error.message)


def _advice(error: ConfigurationError) -> str:
    return (
        f"chmod 0600 {error.details.get('path', '')}".strip()
        if "0600" in error.message
        else "make one: zfabric keys make"
    )
