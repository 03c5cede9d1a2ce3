"""Commands and snippets of the pages: which there are, and as what they are run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.__main__ import app as bench_app
from tests.document.pages import ROOT
from zfabric.cli import controller, gateway, main, worker

PAGES: Final = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK: Final = re.compile(r"(?P<before>[^\n]*)\n+```(?P<language>\w+)\n(?P<body>.*?)```", re.DOTALL)
_FILE: Final = re.compile(r"Save this as `(?P<name>[\w.]+)`:|^`(?P<only>[\w.]+\.py)`:$")
_ASSIGNMENT: Final = re.compile(r"^[A-Z_]+=\S*$")
_BUILDERS: Final[dict[str, Any]] = {
    "zfabric": main.build,
    "zfabric-controller": controller.build,
    "zfabric-gateway": gateway.build,
    "zfabric-worker": worker.build,
}


class Block(NamedTuple):
    """A fenced block: the last line of the text before it, its language, and what is in it."""

    before: str
    language: str
    body: str


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return [Block(match["before"], match["language"], match["body"]) for match in _BLOCK.finditer(page.read_text())]


def file_of(block: Block) -> str:
    """The file that a block is to be saved as, "" for none."""
    match = _FILE.search(block.before)
    return (match["name"] or match["only"]) if match else ""


def commands_of(page: Path) -> Iterator[list[str]]:
    """All commands of the project that a page shows: in blocks, and in the cells of tables."""
    text = page.read_text()
    for block in blocks_of(page):
        if block.language in ("sh", "console"):
            for line in block.body.splitlines():
                yield from segments(line.removeprefix("$ "))
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        for cell in re.findall(r"`(zfabric(?:-\w+)? [^`]+)`", row):
            yield from segments(cell)


def segments(line: str) -> Iterator[list[str]]:
    """The commands of one line that are the project's, without assignments before them and signs after them."""
    try:
        words = shlex.split(line.replace(";", " ; "), comments=True)
    except ValueError:
        # A line of output.
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "&", "&&", "|", "done", "do"):
            if command:
                yield command
            command = []
        elif command or not _ASSIGNMENT.match(word):
            command.append(word)


def check(command: list[str]) -> bool:
    """Have the parser of a command take it. Returns whether there is one.

    Raises:
        Exception: It does not.
    """
    name, arguments = Path(command[0]).name, command[1:]
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in arguments if "=" not in word and word not in targets] == []
        return True
    if command[:3] == ["python", "-m", "bench"]:
        bench_app.parse_args(command[3:], print_error=False, exit_on_error=False)
        return True
    if name not in _BUILDERS or not arguments or arguments == ["--help"]:
        return name in _BUILDERS
    if name == "zfabric-worker":
        # Classes that readers write are run elsewhere; here the other flags are looked at.
        arguments = [
            "echo" if before == "--backend" and ":" in word else word for before, word in pairwise(["", *arguments])
        ]
        for segment in worker.segments(arguments):
            worker._parser(segment, arguments).parse_args(segment, print_error=False, exit_on_error=False)
        return True
    _BUILDERS[name](arguments).parse_args(arguments, print_error=False, exit_on_error=False)
    return True
