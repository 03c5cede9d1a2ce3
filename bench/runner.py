"""Running scenarios: which systems are up, in what order they work, and how long each may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from bench.record import Report
from bench.stack import Outcome, Stack, StackError
from bench.subjects import SUBJECTS
from bench.venvs import PeerMissingError

#: Say what is going on, for whoever waits.
Say = Callable[[str], None]


class Scenario(Protocol):
    """A module of `bench.scenarios`."""

    NAME: str
    TITLE: str

    async def run(self, bench: Bench, report: Report) -> None:
        """Measure."""


@dataclass
class Bench:
    """What a scenario works with.

    Attributes:
        quick: Fewer and shorter rounds.
        say: Shows progress.
        only: Systems to take, all by default.
        traces: Files of arrivals; the shipped one by default.
        beside: zfabric on the drivers that the run is not on, for scenarios that compare them.
    """

    quick: bool
    say: Say
    only: frozenset[str] = frozenset()
    traces: Sequence[str] = ()
    beside: Sequence[str] = ()
    _stacks: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _running: dict[str, Stack] = field(default_factory=dict)
    _missing: dict[str, str] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """How often each system has its turn."""
        return 3 if self.quick else 7

    def seconds(self, quick: float) -> float:
        """How long a turn is."""
        return quick if self.quick else quick * 3

    async def stacks(self, report: Report, names: Sequence[str]) -> dict[str, Stack]:
        """These systems, started where they are not running yet; one that cannot be had is reported and left out."""
        found: dict[str, Stack] = {}
        for name in names:
            if self.only and name not in self.only:
                continue
            if name not in self._running and name not in self._missing:
                self.say(f"starting {name}")
                try:
                    self._running[name] = await self._stacks.enter_async_context(SUBJECTS[name]())
                except (PeerMissingError, StackError) as error:
                    self._missing[name] = str(error)
            if name in self._running:
                found[name] = self._running[name]
            else:
                report.skipped.append(f"{name}: {self._missing[name]}")
        return found

    async def in_turn(
        self,
        report: Report,
        stacks: Mapping[str, Stack],
        job: str,
        *,
        rounds: int | None = None,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        during: Mapping[str, Callable[[], contextlib.AbstractAsyncContextManager[object]]] | None = None,
        **parameters: Any,
    ) -> dict[str, list[Outcome]]:
        """One job at all systems, A B A B; a first turn of each is not counted.

        Args:
            each: Parameters of single systems.
            during: What goes on beside the job of single systems.
        """
        nothing = contextlib.nullcontext
        outcomes: dict[str, list[Outcome]] = {name: [] for name in stacks}
        failed: set[str] = set()
        for turn in range((rounds or self.rounds) + 1):
            for name, stack in stacks.items():
                if name in failed:
                    continue
                self.say(f"{job} · {name} · {'warm-up' if not turn else f'round {turn}'}")
                try:
                    async with (during or {}).get(name, nothing)():
                        outcome = await stack.run(job, **{**parameters, **(each or {}).get(name, {})})
                except StackError as error:
                    failed.add(name)
                    report.skipped.append(f"{name}: {error}")
                    continue
                if turn:
                    outcomes[name].append(outcome)
        return {name: found for name, found in outcomes.items() if found and name not in failed}

    async def close(self) -> None:
        """Stop all systems."""
        self._running.clear()
        await self._stacks.aclose()


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile of unsorted samples."""
    return float(np.percentile(samples, q)) if samples else float("nan")


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: what disturbed one round disturbed both."""
    return [own / other for own, other in zip(ours, theirs, strict=False)]


async def run(scenarios: Sequence[Scenario], bench: Bench) -> list[Report]:
    """Run scenarios in order. One that fails is reported as skipped, with its reason."""
    reports = []
    try:
        for scenario in scenarios:
            report = Report(scenario.NAME, scenario.TITLE)
            began = time.perf_counter()
            try:
                await scenario.run(bench, report)
            except (StackError, PeerMissingError, TimeoutError, OSError) as error:
                report.skipped.append(f"{scenario.NAME} did not finish: {error}")
            report.seconds = round(time.perf_counter() - began, 1)
            reports.append(report)
    finally:
        await bench.close()
    return reports


#: Order of the systems in tables.
COMPARED: Final = ("zfabric", "fastchat", "vllm-router", "sglang-router", "smg", "http", "grpc", "nats")
