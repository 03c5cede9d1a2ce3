"""`zfabric …` against a real fabric: what people see, what programs read, and how it fails."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fabric import Process, processes
from zfabric.cli.sampling import AnswerFlags
from zfabric.wire.sampling import SamplingParams


@pytest.fixture
async def served(ipc: str, run_directory: Path) -> AsyncIterator[str]:
    """The endpoint of a controller with one worker."""
    async with processes(run_directory) as children:
        for module, *arguments in (
            ("controller", "--recovery-ms", "0"),
            ("worker", "--name", "w1", "--tokens-per-second", "2000"),
        ):
            child = await Process.start(f"zfabric.cli.{module}", "--endpoint", ipc, *arguments, directory=run_directory)
            children.append(child)
            await child.ready()
        yield ipc


async def zfabric(endpoint: str, *arguments: str, typed: str | bytes = "", **environment: str) -> tuple[int, str, str]:
    """Run a command. Returns its exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "zfabric.cli.main", *arguments,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "ZFABRIC_ENDPOINT": endpoint, "COLUMNS": "200", **environment},
    )  # fmt: skip
    output, errors = await process.communicate(typed.encode() if isinstance(typed, str) else typed)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_a_conversation(served: str) -> None:
    """Each turn sees the ones before; /reset forgets them."""
    typed = "one two\nthree\n/reset\n\nfour\n/quit\nnever sent\n"
    code, output, _ = await zfabric(served, "chat", "echo", "--max-new-tokens", "2", typed=typed)
    assert code == 0
    answers = [line.split("echo ", 1)[1] for line in output.splitlines() if "echo " in line]
    assert len(answers) == 3
    assert answers[0].startswith("one two")
    assert answers[2].startswith("four four")
    assert "never" not in output


async def test_what_is_no_text_is_told_so(served: str) -> None:
    """As the argument, from standard input, or in the middle of a conversation, which goes on after a wrong turn."""
    strict, lenient = {"PYTHONIOENCODING": "utf-8:strict"}, {"PYTHONIOENCODING": "utf-8:surrogateescape"}
    for arguments, typed, environment, expected in (
        (("generate", "echo", "a \udcff"), b"", strict, "prompt has half a character"),
        (("generate", "echo", "-"), b"a \xff", strict, "standard input is no text"),
        (("generate", "echo", "-"), b"a \xff", lenient, "prompt has half a character"),
        (("chat", "echo"), b"a \xff\n", strict, "standard input is no text"),
    ):
        code, _, errors = await zfabric(served, *arguments, typed=typed, **environment)
        assert code == 1
        assert "error 40300" in errors
        assert expected in errors
        assert "Traceback" not in errors
    code, output, _ = await zfabric(served, "chat", "echo", "--max-new-tokens", "1", typed=b"\xff\nfine\n", **lenient)
    assert code == 0
    assert "error 40300" in output
    assert "echo fine" in output


async def test_json_of_every_command(served: str) -> None:
    for arguments, keys in (
        (("models",), {"name", "workers", "context_length"}),
        (("workers", "--refresh"), {"name", "state", "models", "slots"}),
        (("status",), {"version", "workers", "in_flight", "transport"}),
        (("generate", "echo", "a b", "--max-new-tokens", "2"), {"text", "usage", "worker", "ttft_ms", "finish_reason"}),
        (("count", "echo", "a b"), {"tokens"}),
        (("drain", "w1", "--limit-ms", "1000"), {"draining"}),
    ):
        code, output, errors = await zfabric(served, *arguments, "--json")
        assert code == 0, errors
        found = json.loads(output)
        assert keys <= set(found[0] if isinstance(found, list) else found)


async def test_the_prompt_may_come_from_standard_input(served: str) -> None:
    code, output, errors = await zfabric(served, "generate", "echo", "-", "--max-new-tokens", "2", typed="x y")
    assert (code, output) == (0, "x y \n")
    assert "w1 · 2 tokens" in errors
    assert (await zfabric(served, "count", "echo", "-", typed="x y z"))[1] == "3\n"
    code, output, _ = await zfabric(served, "generate", "echo", "- a list", "--max-new-tokens", "1")
    assert (code, output) == (0, "- \n")


async def test_commands_share_a_table_of_defaults(served: str, tmp_path: Path) -> None:
    """What one command has no use for does not keep it from running; what none knows is named."""
    file = tmp_path / "client.toml"
    file.write_text("[client]\nmax_new_tokens = 3\njson = true\n")
    for arguments in (("models",), ("status",), ("generate", "echo", "a")):
        code, output, errors = await zfabric(served, *arguments, ZFABRIC_CONFIG=str(file))
        assert code == 0, errors
        found = json.loads(output)
    assert found["usage"]["completion_tokens"] == 3
    code, output, _ = await zfabric(
        served, "generate", "echo", "a", ZFABRIC_CONFIG=str(file), ZFABRIC_CLIENT_MAX_NEW_TOKENS="2"
    )
    assert json.loads(output)["usage"]["completion_tokens"] == 2
    file.write_text("[client]\nmax_tokens = 3\n")
    code, _, errors = await zfabric(served, "models", ZFABRIC_CONFIG=str(file))
    assert code == 2
    assert "max_tokens" in errors


async def test_the_environments_endpoint_goes_before_the_files(served: str, tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text(f'[client]\nendpoint = "ipc://{tmp_path}/nobody.sock"\n')
    code, output, errors = await zfabric(served, "models", "--json", ZFABRIC_CONFIG=str(file))
    assert code == 0, errors
    assert json.loads(output)[0]["name"] == "echo"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("generate", "nope", "x"), 1, ["error 40301", "hint: zfabric models"]),
        (("drain", "nope"), 1, ["error 50005", "'nope'", "hint: zfabric workers"]),
        (("operate", "w1", "nothing"), 1, ["error 40305", "nothing"]),
        (("operate", "w1", "call", "novalue"), 1, ["error 40300", "name=value"]),
        (("operate", "w1", "call", "timeout=5"), 1, ["error 40300", "'timeout'", "--help"]),
        (("operate", "w1", "nothing", "--timeout", "-1"), 1, ["error 40302", "timeout is -1.0"]),
        (("generate", "echo", "x", "--priority", "5000"), 1, ["error 40302", "priority is 5000"]),
        (("generate", "echo", "x", "--top-p", "2"), 1, ["error 40302", "top_p"]),
        (("generate", "echo", "x", "--top-k", "2"), 1, ["error 40304", "top_k"]),
        (("generate", "echo", "x", "--top-k", "many"), 2, ["top-k", "try --help"]),
        (("generate", "echo"), 2, ["prompt", "try --help"]),
        (("generate", "echo", "x", "--fly"), 2, ["--fly", "try --help"]),
        (("chat", "echo", "--fly"), 2, ["--fly", "try --help"]),
        (("fly",), 2, ["fly", "try --help"]),
    ],
)
async def test_failures_are_a_sentence(served: str, arguments: tuple[str, ...], code: int, says: list[str]) -> None:
    found, _, errors = await zfabric(served, *arguments)
    assert found == code
    assert "Traceback" not in errors
    for part in says:
        assert part in errors


async def test_a_reader_that_has_enough_is_no_failure(served: str) -> None:
    """As in `zfabric generate … | head -c 1`."""
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "zfabric.cli.main", "generate", "echo", "x", "--max-new-tokens", "100000",
        stdout=writing, stderr=subprocess.PIPE, env={**os.environ, "ZFABRIC_ENDPOINT": served},
    )  # fmt: skip
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    _, errors = await process.communicate()
    assert process.returncode == 141
    assert errors == b""


async def test_the_help_says_which_requests_go_first(ipc: str) -> None:
    code, output, _ = await zfabric(ipc, "generate", "--help")
    assert code == 0
    assert "those with the lowest number are served first" in " ".join(output.replace("│", " ").split())
    assert "higher priority" not in output


def test_flags_of_answers_are_the_librarys_parameters() -> None:
    assert set(AnswerFlags.__dataclass_fields__) <= {*SamplingParams.__struct_fields__, "deadline_ms", "priority"}
    assert AnswerFlags().given() == {}
    assert AnswerFlags(top_k=0, seed=0).given(max_new_tokens=5) == {"top_k": 0, "seed": 0, "max_new_tokens": 5}
