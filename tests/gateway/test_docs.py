"""docs/gateway.md and docs/gateway/: what is shown is run."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import gateway
from zfabric import errors
from zfabric.backends.echo import EchoWorker
from zfabric.cli import gateway as command
from zfabric.cli import main
from zfabric.gateway.app import ENDPOINTS
from zfabric.gateway.errors import status_of
from zfabric.gateway.keys import read_keys

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = "\n".join(page.read_text() for page in (DOCS / "gateway.md", *sorted((DOCS / "gateway").glob("*.md"))))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def lines(begin: str) -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith(begin)]


@pytest.mark.parametrize("line", lines("bin/zfabric"))
def test_commands_are_what_the_parsers_take(line: str) -> None:
    name, *arguments = shlex.split(line)
    build: Any = {"bin/zfabric": main.build, "bin/zfabric-gateway": command.build}[name]
    _, bound, _ = build(arguments).parse_args(arguments, print_error=False, exit_on_error=False)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    flags = {flag.removeprefix("--").removeprefix("no-") for flag in own if flag.startswith("--")}
    assert set(bound.arguments) >= {flag.replace("-", "_") for flag in flags}


async def test_the_calls_work_as_they_stand() -> None:
    async with gateway(EchoWorker()) as served:
        for line in lines("curl"):
            here = line.replace("http://127.0.0.1:8000", served.url)
            child = await asyncio.create_subprocess_shell(here, stdout=asyncio.subprocess.PIPE)
            told = (await child.communicate())[0].decode()
            assert child.returncode == 0
            assert "error" not in told, f"{line}: {told}"
            assert '"echo"' in told
        for block in blocks("python"):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", block.replace("http://127.0.0.1:8000", served.url), stdout=asyncio.subprocess.PIPE
            )
            assert (await child.communicate())[0].decode() == "Hello there " * 4


def test_the_file_of_keys_is_one(tmp_path: Path) -> None:
    [block] = blocks("toml")
    (tmp_path / "keys.toml").write_text(block)
    table = read_keys(tmp_path / "keys.toml")
    assert table.find(b"Bearer sk-a-secret")[0] == "team-a"
    assert table.fabric_keys == {None, "/etc/zfabric/team-b.key_secret"}


def test_every_path_is_told_of_and_every_status() -> None:
    assert [endpoint.path for endpoint in ENDPOINTS if endpoint.path.rstrip("/") not in PAGE] == []
    statuses = {status_of(kind("x")) for kind in errors.BY_CODE.values()}
    told = set(map(int, re.findall(r"\b(4\d\d|5\d\d)\b", PAGE.partition("## Errors")[2].partition("## Adding")[0])))
    assert statuses <= told
