"""The whole fabric on one machine: a controller, two workers on a real chat model, and several chats at once.

    python examples/demo.py                   # SmolLM2-135M-Instruct through transformers
    python examples/demo.py --backend echo    # no model, no torch

All processes it starts, it ends, also when it is interrupted or told to end itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from zfabric import AsyncClient, FabricError

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue? Answer in one sentence.",
    "Write a haiku about the sea.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
)
WORKERS = 2


@dataclass
class Chat:
    """One request and what is known of it."""

    question: str
    text: str = ""
    worker: str = "…"
    started: float = 0.0
    first: float | None = None
    ended: float | None = None
    tokens: int = 0
    error: str = ""

    def headline(self) -> str:
        if self.error:
            return self.error
        if self.first is None:
            return "waiting"
        elapsed = (self.ended or time.perf_counter()) - self.first
        rate = (self.tokens - 1) / elapsed if self.tokens > 1 and elapsed > 0 else 0.0
        ttft_ms = (self.first - self.started) * 1_000
        return f"{self.worker} · first token after {ttft_ms:,.0f} ms · {rate:,.1f} tokens/s · {self.tokens} tokens"


@dataclass
class Processes:
    """Children, ended in the order in which they were started last."""

    children: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[str]:
        # A session of its own keeps the terminal's Ctrl-C from the child: this process decides when it ends.
        with log.open("w") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=child_environment(log.parent),
                start_new_session=True,
            )
        self.children.append(child)
        return child

    def end(self) -> None:
        # Another signal must not leave children behind; they have ten seconds each at most.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for child in reversed(self.children):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def child_environment(directory: Path) -> dict[str, str]:
    """One thread for each worker, and none of the user's own settings: the demo shows the same everywhere."""
    settings = directory / "none.toml"
    settings.touch()
    own = ("ZFABRIC_CONTROLLER_", "ZFABRIC_WORKER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return environment | {
        "ZFABRIC_CONFIG": str(settings),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }


@contextlib.contextmanager
def progress(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Say what takes its time: a line that turns on a terminal, a line for each step elsewhere."""
    if console.is_terminal:
        with console.status(text) as status:
            yield status.update
        return
    console.print(f"── {text}")
    yield lambda step: console.print(f"── {step}")


def wait_ready(child: subprocess.Popen[str], name: str, log: Path) -> str:
    """The ready message of a child. Raises: SystemExit with the end of its log if it dies instead."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line.startswith("ready"):
        raise SystemExit(f"{name} did not start:\n{log.read_text()[-2_000:]}")
    return line.strip()


@contextlib.contextmanager
def fabric(backend: str, console: Console) -> Iterator[tuple[str, str]]:
    """A controller and workers. Yields the endpoint and the model's name."""
    processes = Processes()
    with tempfile.TemporaryDirectory(prefix="zfabric-demo-") as name:
        directory = Path(name)
        endpoint = f"ipc://{directory}/controller.sock"
        arguments = ["--backend", "echo"]
        model = "echo"
        if backend == "transformers":
            model = "smollm2"
            arguments = ["--backend", "transformers", "--model", str(model_directory(console)), "--model-names", model]
            arguments += ["--threads", "1"]
        else:
            arguments += ["--tokens-per-second", "60"]
        try:
            with progress(console, "starting the controller and two workers") as update:
                started = time.monotonic()
                logs = [directory / f"{part}.log" for part in ("controller", "worker-1", "worker-2")]
                controller = processes.start("zfabric.cli.controller", "--endpoint", endpoint, log=logs[0])
                console.print(wait_ready(controller, "the controller", logs[0]))
                workers = [
                    processes.start(
                        "zfabric.cli.worker", *arguments, "--endpoint", endpoint, "--name", f"worker-{n}", log=logs[n]
                    )
                    for n in range(1, WORKERS + 1)
                ]
                for number, worker in enumerate(workers, start=1):
                    update(f"worker-{number} loads its model")
                    console.print(wait_ready(worker, f"worker-{number}", logs[number]))
                console.print(f"up in {time.monotonic() - started:.1f} s\n")
            yield endpoint, model
        finally:
            with progress(console, "ending all processes"):
                processes.end()


def model_directory(console: Console) -> Path:
    """The real model; assembled once, which takes half a minute, and cached."""
    command = [sys.executable, "-m", "zfabric.models", "smollm2"]
    errors: list[str] = []
    with (
        progress(console, "looking for SmolLM2-135M-Instruct") as update,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TQDM_DISABLE": "1"},
        ) as child,
    ):
        assert child.stderr is not None
        assert child.stdout is not None
        try:
            for line in child.stderr:
                errors.append(line)
                if line.startswith("──"):
                    update(f"assembling SmolLM2-135M-Instruct: {line.strip('─ ').strip()}")
            path = child.stdout.read().strip()
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise SystemExit("the model could not be assembled:\n" + "".join(errors[-20:]))
    return Path(path)


async def answer(client: AsyncClient, model: str, chat: Chat) -> None:
    """Ask one question and fill in what comes."""
    chat.started = time.perf_counter()
    try:
        messages = [{"role": "user", "content": chat.question}]
        stream = client.stream(model, messages=messages, max_new_tokens=64, **sampling(model))
        async for delta in stream:
            chat.first = chat.first or time.perf_counter()
            chat.tokens += len(delta.token_ids)
            chat.text += delta.text
            chat.worker = stream.worker or chat.worker
    except FabricError as error:
        chat.error = f"error {error.code}: {error.message}"
    chat.ended = time.perf_counter()


def sampling(model: str) -> dict[str, Any]:
    return {} if model == "echo" else {"temperature": 0.0, "repetition_penalty": 1.1}


def picture(chats: list[Chat]) -> Group:
    """All chats as they stand."""
    panels = []
    for chat in chats:
        colour = "red" if chat.error else "green" if chat.ended else "yellow"
        panels.append(
            Panel(
                Text(chat.text or " "),
                title=Text(chat.question, style="bold"),
                title_align="left",
                subtitle=Text(chat.headline()),
                subtitle_align="right",
                border_style=colour,
            )
        )
    return Group(*panels)


@contextlib.asynccontextmanager
async def shown(chats: list[Chat], console: Console) -> AsyncIterator[None]:
    """Show chats while they run: live on a terminal, once at the end elsewhere."""
    if not console.is_terminal:
        yield
        console.print(picture(chats))
        return
    with Live(picture(chats), console=console, refresh_per_second=15) as live:

        async def refresh() -> None:
            while True:
                live.update(picture(chats))
                await asyncio.sleep(0.066)

        task = asyncio.create_task(refresh())
        yield
        task.cancel()
        live.update(picture(chats))


async def talk(endpoint: str, model: str, console: Console) -> int:
    """All questions at once. Returns how many failed."""
    chats = [Chat(question) for question in QUESTIONS]
    started = time.perf_counter()
    async with AsyncClient(endpoint) as client, shown(chats, console):
        await asyncio.gather(*(answer(client, model, chat) for chat in chats))
    elapsed = time.perf_counter() - started
    tokens = sum(chat.tokens for chat in chats)
    served = sorted({chat.worker for chat in chats})
    console.print(
        f"{len(chats)} chats at once, {tokens} tokens in {elapsed:.1f} s: {tokens / elapsed:,.0f} tokens/s "
        f"from {', '.join(served)}"
    )
    return sum(bool(chat.error) for chat in chats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("transformers", "echo"), default="transformers")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, told_to_end)
    try:
        with fabric(arguments.backend, console) as (endpoint, model):
            failed = asyncio.run(talk(endpoint, model, console))
    except KeyboardInterrupt:
        console.print("interrupted; all processes are ended")
        return 128 + signal.SIGINT
    except FabricError as error:
        console.print(f"error {error.code}: {error.message}", markup=False)
        return 1
    return 1 if failed else 0


def told_to_end(number: int, _: object) -> None:
    """Leave by way of everything that cleans up."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
