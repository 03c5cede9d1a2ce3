"""Hostile peers against a running fabric: `python -m tests.fuzz.live --messages 100000`.

Controller, worker and attackers are processes of their own; well-behaved clients are here. Nobody else may feel the attack: all
their answers come, and are right; no process ends or fails at anything; the controller's memory stays within a bound.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table

from tests.fabric import Process, processes, words
from zfabric import AsyncClient, Credentials
from zfabric.transport.curve import create_keys

#: Streams that are read all the time, and tokens of each answer.
STREAMS: Final = 4
_TOKENS: Final = 50
_TOKENS_PER_SECOND: Final = 200
#: How long well-behaved requests may take to end once the attack is over.
_PATIENCE_S: Final = 60


@dataclass
class Outcome:
    """What became of an attack.

    Attributes:
        said: What was sent, by what it was, and how often.
        seconds: How long it took.
        rss_before, rss_most, rss_after: Of the controller, in bytes.
        answers: Well-behaved requests that ended while it lasted, all with the right text.
        quiet_gaps_ms, beside_gaps_ms, gaps_ms: Times between two deltas of a well-behaved stream, by round: in peace, while
            another fabric of this host was attacked, and under attack.
    """

    said: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    rss_before: int = 0
    rss_most: int = 0
    rss_after: int = 0
    answers: int = 0
    quiet_gaps_ms: list[list[float]] = field(default_factory=list)
    beside_gaps_ms: list[list[float]] = field(default_factory=list)
    gaps_ms: list[list[float]] = field(default_factory=list)

    def ratios(self, to: list[list[float]]) -> list[float]:
        """Of the p99 gap under attack to another one, in each round, the least first."""
        return sorted(_p99(meanwhile) / _p99(other) for other, meanwhile in zip(to, self.gaps_ms, strict=True))

    def add(self, other: Outcome) -> None:
        """Another attack's outcome on top of this one."""
        self.said = dict(Counter(self.said) + Counter(other.said))
        self.seconds += other.seconds
        self.rss_most = max(self.rss_most, other.rss_most)
        self.answers += other.answers
        self.gaps_ms += other.gaps_ms

    @property
    def messages(self) -> int:
        """All that was sent, but for connections that were never more than half open."""
        return sum(self.said.values()) - self.said.get("half-open connections", 0)


class Crowd:
    """Well-behaved clients: each of their answers is looked at, word by word."""

    def __init__(self, client: AsyncClient, gossip: Path) -> None:
        self.client = client
        self.gossip = gossip
        self.answers = 0
        self.gaps_ms: list[float] = []
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._over.clear()
        self._tasks = [asyncio.create_task(self._read(number)) for number in range(STREAMS)]
        self._tasks.append(asyncio.create_task(self._ask()))

    async def stop(self) -> None:
        """Let what runs come to its end. Raises: AssertionError, FabricError, TimeoutError: One did not, or was wrong."""
        self._over.set()
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(*self._tasks)

    def take_gaps(self) -> list[float]:
        """The gaps so far; they are counted anew from here on."""
        gaps, self.gaps_ms = self.gaps_ms, []
        return gaps

    async def failed(self) -> None:
        """Until one of them fails; raises what it failed with."""
        await asyncio.gather(*self._tasks)

    async def _read(self, number: int) -> None:
        while not self._over.is_set():
            prompt = f"stream {number} {self.answers}"
            stream = self.client.stream("echo", prompt, max_new_tokens=_TOKENS, temperature=0)
            last = 0.0
            async for _ in stream:
                now = time.perf_counter()
                if last:
                    self.gaps_ms.append((now - last) * 1_000)
                last = now
            assert stream.text == words(prompt, _TOKENS)
            self.answers += 1

    async def _ask(self) -> None:
        """Short requests and questions, one after the other; what outsiders overhear of them is written down."""
        while not self._over.is_set():
            prompt = f"short {self.answers}"
            self._tell()
            assert (await self.client.generate("echo", prompt, max_new_tokens=3)).text == words(prompt, 3)
            await self.client.status()
            self.answers += 1

    def _tell(self) -> None:
        session = self.client._connection.session
        attempts = [(session.instance, number, pending.attempt) for number, pending in session.requests.items()]
        told = {"attempts": attempts, "sessions": [*range(1, 4)], "workers": ["honest"]}
        new = self.gossip.with_suffix(".new")
        new.write_text(json.dumps(told))
        new.replace(self.gossip)


async def run(
    messages: int,
    seed: int,
    *,
    keys: bool,
    quiet_answers: int,
    half_open: int,
    together: int = 16,
    nice: int = 0,
    rounds: int = 1,
    beside: bool = False,
) -> Outcome:
    """Attack a fabric of its own.

    Args:
        keys: Whether the fabric has keys, and attackers have some that allow little.
        quiet_answers: Answers that well-behaved clients get in each round before the attack.
        half_open: Connections that say half a greeting.
        together: Other connections at a time.
        nice: By how much attackers give way to those whom they attack, who elsewhere have a machine of their own.
        rounds: In each there is peace first, and an attack by so many of the messages then.
        beside: Have another fabric of this host attacked in between, in the same way: attackers take processors from
            whoever shares them, and this tells that from what they do to the fabric.

    Raises:
        AssertionError: Somebody felt it.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="zf-") as name:
        directory = Path(name)
        async with contextlib.AsyncExitStack() as held:
            endpoint, children = await held.enter_async_context(_fabric(directory, keys))
            victims = [endpoint]
            if beside:
                (directory / "other").mkdir()
                other, _ = await held.enter_async_context(_fabric(directory / "other", keys))
                victims.insert(0, other)
            controller = psutil.Process(children[0].process.pid)
            own = _credentials(directory, "own") if keys else None
            async with AsyncClient(endpoint, credentials=own) as client:
                crowd = Crowd(client, directory / "gossip.json")
                crowd._tell()
                for number, victim in enumerate(victims * rounds):
                    attacked = victim == endpoint
                    if victim == victims[0]:
                        outcome.quiet_gaps_ms.append(await _be_quiet(crowd, quiet_answers))
                        outcome.rss_before = outcome.rss_before or controller.memory_info().rss
                    command = [
                        "tests.fuzz.attackers", victim, "--gossip", str(crowd.gossip), "--model", "echo",
                        "--seed", str(seed + number // len(victims)), "--messages", str(messages // rounds),
                        "--half-open", str(half_open), "--together", str(together), "--nice", str(nice),
                        *(["--keys", str(directory if attacked else directory / "other")] if keys else []),
                    ]  # fmt: skip
                    attackers = await Process.start(*command, directory=directory)
                    children.append(attackers)
                    felt = await _read_meanwhile(crowd, attackers, controller)
                    if attacked:
                        outcome.add(felt)
                    else:
                        outcome.beside_gaps_ms += felt.gaps_ms
                outcome.rss_after = controller.memory_info().rss
            for child in children[:2]:
                assert child.process.returncode is None, child.log.read_text()
                log = child.log.read_text()
                assert "internal_error" not in log, log[-4_000:]
                assert "Traceback" not in log, log[-4_000:]
    return outcome


async def _be_quiet(crowd: Crowd, answers: int) -> list[float]:
    """Have the crowd read so many answers that nobody disturbs. Returns the gaps in them."""
    crowd.start()
    enough = crowd.answers + answers
    while crowd.answers < enough:
        await asyncio.sleep(0.01)
    await crowd.stop()
    return crowd.take_gaps()


async def _read_meanwhile(crowd: Crowd, attackers: Process, controller: psutil.Process) -> Outcome:
    """Have the crowd read until the attackers have said all. Raises: AssertionError, one of its answers did not come."""
    before = crowd.answers
    outcome = Outcome()
    started = time.monotonic()
    crowd.start()
    failed = asyncio.create_task(crowd.failed())
    said = asyncio.create_task(_result(attackers))
    while not said.done():
        await asyncio.wait({failed, said}, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
        outcome.rss_most = max(outcome.rss_most, controller.memory_info().rss)
    outcome.said = said.result()
    outcome.seconds = time.monotonic() - started
    outcome.gaps_ms = [crowd.take_gaps()]
    await crowd.stop()
    crowd.take_gaps()
    await failed
    outcome.answers = crowd.answers - before
    return outcome


async def _result(process: Process) -> dict[str, int]:
    assert process.process.stdout is not None
    told = await process.process.stdout.read()
    assert await process.ended() == 0, process.log.read_text()
    said: dict[str, int] = json.loads(told)
    return said


@contextlib.asynccontextmanager
async def _fabric(directory: Path, keys: bool) -> AsyncIterator[tuple[str, list[Process]]]:
    """A controller and a worker, as processes, in this order."""
    given: list[str] = []
    guarded: list[str] = []
    if keys:
        for name in ("controller", "own", "honest", "user", "gpu"):
            create_keys(directory, name)
        ring = directory / "keyring.toml"
        ring.write_text(
            '[own]\nrole = "client"\nkey = "own.key"\n[honest]\nrole = "worker"\nkey = "honest.key"\n'
            '[user]\nrole = "client"\nkey = "user.key"\nmodels = ["echo", "evil"]\n'
            '[gpu]\nrole = "worker"\nkey = "gpu.key"\nmodels = ["evil"]\nworkers = ["evil*"]\n'
        )
        given = ["--key", str(directory / "controller.key_secret"), "--keyring", str(ring)]
        guarded = ["--key", str(directory / "honest.key_secret"), "--controller-key", str(directory / "controller.key")]
    async with processes(directory) as children:
        controller = await Process.start(
            "zfabric.cli.controller", "--endpoint", "tcp://127.0.0.1:*", *given, directory=directory
        )
        children.append(controller)
        endpoint = (await controller.ready()).partition("endpoint=")[2]
        worker = await Process.start(
            "zfabric.cli.worker", "--endpoint", endpoint, "--name", "honest", "--slots", "64", "--tokens-per-second",
            str(_TOKENS_PER_SECOND), *guarded, directory=directory,
        )  # fmt: skip
        children.append(worker)
        await worker.ready()
        yield endpoint, children


def _credentials(directory: Path, name: str) -> Credentials:
    return Credentials.load(directory / f"{name}.key_secret", directory / "controller.key")


def _p99(gaps: list[float]) -> float:
    ordered = sorted(gaps)
    return ordered[len(ordered) * 99 // 100] if ordered else 0.0


def main() -> int:
    """Attack a fabric without keys, and one with keys."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.live", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="of both attacks together (100,000)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="of all that is said")
    parser.add_argument("--half-open", type=int, default=2_000, help="connections that say half a greeting (2,000)")
    parser.add_argument("--rounds", type=int, default=5, help="of peace, and an attack then (5)")
    parser.add_argument("--nice", type=int, default=0, help="by how much attackers give way to the others (0)")
    given = parser.parse_args()
    console = Console()
    console.print(f"seed {given.seed}", highlight=False)
    sizes, gaps = Table("fabric", box=None), Table("fabric", box=None)
    for title in ("messages", "s", "answers", "MiB before", "most", "after"):
        sizes.add_column(title, justify="right")
    for title in ("p99 gap, ms", "another attacked", "under attack", "to peace", "to another's"):
        gaps.add_column(title, justify="right")
    for keys in (False, True):
        outcome = asyncio.run(
            run(
                given.messages // 2, given.seed, keys=keys, quiet_answers=200, half_open=given.half_open, nice=given.nice,
                rounds=given.rounds, beside=True,
            )
        )  # fmt: skip
        name = "with keys" if keys else "without"
        console.print({name: outcome.said}, highlight=False)
        rss = (outcome.rss_before, outcome.rss_most, outcome.rss_after)
        sizes.add_row(
            name, f"{outcome.messages:,}", f"{outcome.seconds:.0f}", f"{outcome.answers:,}",
            *(f"{size / 2**20:.0f}" for size in rss),
        )  # fmt: skip
        times = (outcome.quiet_gaps_ms, outcome.beside_gaps_ms, outcome.gaps_ms)
        gaps.add_row(
            name, *(f"{statistics.median(map(_p99, phase)):.1f}" for phase in times),
            *(" ".join(f"{ratio:.1f}" for ratio in outcome.ratios(phase)) for phase in times[:2]),
        )  # fmt: skip
    console.print(sizes)
    console.print(gaps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
