"""The core of models over pages on a device that computes by itself: its host is one step behind.

A step needs the tokens that the one before drew, and these are on the device already. So the next step is begun before the host
has read them: while the device computes it, the host makes texts and deltas of what was drawn before. A row that ends is found
out one step late, and what was computed of it beyond is dropped. Penalties go on with what was drawn where it was drawn. Whatever
needs the host in between, such as a prompt, drafts, or a guide that the last token moves, has steps as ever, once what was begun
is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from zfabric.backends.hf_transformers.failures import out_of_memory
from zfabric.backends.hf_transformers.sampling.pending_draws import PendingDraws
from zfabric.backends.hf_transformers.scheduling.paged_core import PagedCore
from zfabric.backends.hf_transformers.scheduling.paged_row import PagedRow, Steps
from zfabric.backends.hf_transformers.scheduling.weight_switch import SwitchMode


@dataclass(slots=True)
class _Begun:
    """A step that is begun. Its rows have `done` counted for it.

    Attributes:
        rows: In the order of the draws.
    """

    rows: list[PagedRow]
    draws: PendingDraws


class AheadCore(PagedCore):
    """Steps rows over pages, one step ahead of the host; arguments as of `PagedCore`.

    Attributes:
        steps_ahead: Steps that were begun before the draws of the one before were read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begun: _Begun | None = None
        #: Who ran and waited when there was no room for another.
        self._seen: tuple[int, int, Any] | None = None
        self.steps_ahead = 0

    def _compute(self) -> None:
        rows = self._going()
        if rows:
            self._run_ahead(rows)
        else:
            self._catch_up()
            super()._compute()

    def _admit(self, budget: int) -> None:
        super()._admit(budget)
        # Else it ended for want of tokens in this pass, and goes on in the next.
        for_want_of_room = sum(row.left for row in self._rows if not row.begun) < budget
        self._seen = self._line() if for_want_of_room else None

    def renew(self, mode: SwitchMode, version: str) -> int:
        # What was begun is of the former weights.
        self._catch_up()
        return super().renew(mode, version)

    def _drop_all(self) -> None:
        self._begun = None
        super()._drop_all()

    @property
    def gauges(self) -> dict[str, float]:
        return {**super().gauges, "steps_ahead": self.steps_ahead}

    def _going(self) -> list[PagedRow]:
        """Rows whose next step can be begun now: none unless that holds for all of those that go on."""
        if self._speculation is not None or (self._waiting and not self._as_seen()):
            return []
        begun = set() if self._begun is None else set(map(id, self._begun.rows))
        going = []
        for row in self._rows:
            if not (row.begun and not row.sequence.row.host_bound and (not begun or id(row) in begun)):
                return []
            if len(row.sequence.output) + bool(begun) < row.sequence.limit:
                going.append(row)
        for row in going:
            if not self._pool.grow(row.tables, self._pool.blocks_for(row.done + 1)):
                return []
        return going

    def _line(self) -> tuple[int, int, Any]:
        return len(self._rows), len(self._waiting), self._waiting[-1] if self._waiting else None

    def _as_seen(self) -> bool:
        """Whether there is room for nobody still: no row has left since nobody was admitted, and nobody else has come."""
        line = self._line()
        return self._seen is not None and line[:2] == self._seen[:2] and line[2] is self._seen[2]

    def _run_ahead(self, rows: list[PagedRow]) -> None:
        """Begin a step of these, and then read the one before. Raises: Exception: As of a step."""
        began = time.monotonic()
        before = self._begun
        try:
            parts = [row.step() for row in rows]
            logits = self._runner.forward(parts, None if before is None else _of(before, rows))
            sequences = [row.sequence for row in rows]
            draws = self._sampler.sample_async(sequences, logits, None if before is None else [1] * len(rows))
        except Exception as error:  # noqa: BLE001 — judged as of any step
            self._catch_up()
            # Who has ended with the step before cannot fail any more.
            steps: Steps = [(row, []) for row in rows if row.tables.blocks]
            if steps or not out_of_memory(error):
                self._failed(steps, [], error)
            return
        for row in rows:
            row.done += 1
        self._begun = _Begun(rows, draws)
        if before is not None:
            self.steps_ahead += 1
            self._read(before)
            self._measured([(row, []) for row in rows], [], time.monotonic() - began)

    def _catch_up(self) -> None:
        """Read what was begun."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self._read(begun)

    def _read(self, step: _Begun) -> None:
        """Give the rows of a step their tokens. Who has left in the meantime has none."""
        there = [(row, one) for row, one in zip(step.rows, step.draws.result(), strict=True) if row.tables.blocks]
        size = self._pool.tokens
        for row, _ in there:
            known = len(row.answer.prompt) + len(row.sequence.output)
            if not known % size:
                self._pool.learn(row.tables, row.sequence.tokens())
            if self._pool.slides:
                # The step that is begun already has one token more.
                self._pool.give_back(row.tables, known)
        self._draw([row for row, _ in there], [one for _, one in there])


def _of(step: _Begun, rows: list[PagedRow]) -> torch.Tensor:
    """What a step drew for some of its rows, on the device."""
    tokens = step.draws.tokens
    if len(rows) == len(step.rows):
        return tokens
    places = {id(row): place for place, row in enumerate(step.rows)}
    return tokens[torch.tensor([places[id(row)] for row in rows], device=tokens.device)]
