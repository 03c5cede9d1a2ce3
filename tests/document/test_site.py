"""The site: every page has its place, every command is one, and what the first pages show is run as it stands."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import zfabric
from tests.document.commands import PAGES, Block, blocks_of, check, commands_of, file_of
from tests.document.pages import ROOT
from zfabric import testing
from zfabric.errors import FabricError

#: Pages whose blocks are run one after the other, as a reader does who follows them.
FOLLOWED = ("quickstart.md", "tutorials/backend.md", "tutorials/fastchat.md")
#: What only a real model can do: its commands are parsed here, and run in tests/integration/test_processes.py.
_NEEDS_A_MODEL = "--backend transformers"


def test_every_page_has_its_place() -> None:
    docs = ROOT / "docs"
    index = (docs / "index.md").read_text()
    listed = {name for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL) for name in block.split()}
    pages = {str(page.relative_to(docs).with_suffix("")) for page in docs.rglob("*.md")}
    assert pages - {"index"} <= listed


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"zfabric\.(?:testing\.)?(\w+)", page))
    errors = {name for name in zfabric.__all__ if isinstance(getattr(zfabric, name), type)
              and issubclass(getattr(zfabric, name), FabricError)}  # fmt: skip
    wanted = {*zfabric.__all__, *testing.__all__} - errors - {"__version__"}
    assert wanted - shown <= {"ClusterOptions", "Report", "Violation", "examine"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_what_the_parsers_take(page: Path) -> None:
    for command in commands_of(page):
        try:
            check(command)
        except Exception as error:
            raise AssertionError(f"{page.name} shows {' '.join(command)}: {error}") from error


def test_many_commands_are_checked() -> None:
    found = [command for page in PAGES for command in commands_of(page)]
    assert len([command for command in found if command[0].rpartition("/")[2].startswith("zfabric")]) > 60


def _script(blocks: list[Block]) -> tuple[str, list[tuple[int, str]]]:
    """A page as a script of bash, and the texts that it says that some of its blocks print."""
    lines, expected = ["set -eu", "trap 'kill $(jobs -p); wait' EXIT"], []
    for number, block in enumerate(blocks):
        if _NEEDS_A_MODEL in block.body or block.language not in ("sh", "python", "text"):
            continue
        if block.language == "text":
            expected.append((number - 1, block.body))
        elif block.language == "python":
            name = file_of(block)
            lines.append(f"cat > {name or f'block{number}.py'} <<'END'\n{block.body}END")
            if not name:
                lines.append(f"python block{number}.py >> out{number}")
        else:
            for line in block.body.splitlines():
                started = line.endswith(" &")
                lines.append(f"{line.removesuffix(' &')} > log{number} 2>&1 &" if started else f"{line} >> out{number}")
    return "\n".join(lines), expected


async def _follow(page: str) -> None:
    """Do what a page says, in a directory of its own, at an endpoint of its own."""
    directory = Path(tempfile.mkdtemp(prefix="zf-page-"))
    try:
        (directory / "bin").symlink_to(ROOT / "bin")
        script, expected = _script(blocks_of(ROOT / "docs" / page))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ZFABRIC_")},
            "ZFABRIC_ENDPOINT": f"ipc://{directory}/c.sock",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        child = await asyncio.create_subprocess_exec(
            "bash", "-c", script, cwd=directory, env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        told = (await child.communicate())[0].decode()
        logs = "".join(path.read_text() for path in directory.glob("log*"))
        assert child.returncode == 0, f"{page}: {told}\n{logs}"
        for number, text in expected:
            assert (directory / f"out{number}").read_text() == text, page
    finally:
        shutil.rmtree(directory)


async def test_the_first_pages_work_as_they_stand() -> None:
    await asyncio.gather(*map(_follow, FOLLOWED))
