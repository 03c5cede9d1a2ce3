"""The core of models over pages: each turn is one pass, in which running rows are stepped and prompts are computed in parts.

A row has tables of blocks, so joining and leaving moves nothing. Blocks of a prompt that are known are taken over; those
that it needs besides are given when it is admitted, and one more in each table whenever a row has filled its last. Where layers
have windows, a row gives back what lies behind them as it goes on, and its tables reach as far ahead as it may get in a
pass. If there is no block for it then, the youngest row gives its blocks back and waits at the head of the line; what is no
longer known of it is computed again, and since a draw depends on seed and position alone, its text is the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Many
from typing import Any

from zfabric.backends.front.cached import CacheTranslator
from zfabric.backends.hf_transformers.cache.block_pool import BlockPool
from zfabric.backends.hf_transformers.failures import as_fabric_error, out_of_memory
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner
from zfabric.backends.hf_transformers.runner.vision import Sight
from zfabric.backends.hf_transformers.sampling.pending_draws import Drawn
from zfabric.backends.hf_transformers.scheduling.engine_core import EngineCore
from zfabric.backends.hf_transformers.scheduling.paged_row import (
    Drawing,
    Line,
    PagedRow,
    Steps,
    Work,
    accepted,
    parts_of,
)
from zfabric.backends.hf_transformers.scheduling.prompt_share import PromptShare
from zfabric.backends.hf_transformers.speculative.speculation import Speculation


class PagedCore(EngineCore):
    """Steps rows over pages; further arguments as of `EngineCore`.

    Args:
        runner: The forward pass over pages.
        speculation: Guesses what rows go on with; None for nothing.
    """

    def __init__(self, runner: PagedRunner, *args: Any, speculation: Speculation | None = None, **kwargs: Any) -> None:
        super().__init__(runner.model, *args, **kwargs)
        self._runner = runner
        self._speculation = speculation
        self._share = PromptShare(self._token_budget.tokens_max, self._token_budget.wait_s)
        self._told_cache: CacheTranslator | None = None
        self._tell_cache: Callable[[CacheTranslator], None] = lambda changes: None
        self._pool = self._empty_pool()
        self._rows: list[PagedRow] = []
        #: Tokens of prompts that came, and of these what the cache had.
        self._asked = self._found = 0
        self._unshared = itertools.count()

    def _sequences(self) -> list[Sequence]:
        return [one for row in list(self._rows) for one in (row.sequence, *row.others)]

    @property
    def running(self) -> int:
        return len({id(row.answer) for row in list(self._rows)})

    @property
    def kv_tokens_free(self) -> int:
        return min(self._kv_tokens_max, self._runner.layout.cells(self._pool.available, self._pool.tokens))

    @property
    def kv_tokens_held(self) -> int:
        # Pages are there from the first pass on, which is before the first request.
        return self._kv_tokens_max

    @property
    def gauges(self) -> dict[str, float]:
        guessed = {} if self._speculation is None else self._speculation.gauges
        return {"prefix_cache_queries": self._asked, "prefix_cache_hits": self._found, **guessed}

    def _compute(self) -> None:
        begun = sum(row.begun for row in self._rows)
        waiting = len(self._rows) - begun + max(0, min(len(self._waiting), self._places()))
        budget = self._share.tokens(running=begun, waiting=waiting)
        # Who is there goes before who comes: what a prompt has given back behind its windows it needs ahead.
        self._make_room()
        if self._waiting:
            self._admit(budget)
        self._see()
        stepped = [row for row in self._rows if row.begun]
        if len(stepped) == len(self._rows):
            self._pass(self._guessed(stepped), [])
        else:
            self._pass_with_prompts(stepped, budget)
        if self._told_cache is not None and self._told_cache.due:
            self._tell_cache(self._told_cache)

    def _pass_with_prompts(self, stepped: list[PagedRow], budget: int) -> None:
        """A step of these, and so many tokens of prompts."""
        coming = [row for row in self._rows if not (row.begun or row.blind)]
        prompts = parts_of([row for row in coming if not row.answer.suspect], budget, self._share.part_max)
        alone = self._token_budget.budget(running=True)
        suspects = [(row, row.fitting(alone)) for row in coming if row.answer.suspect][:1]
        self._pass(self._guessed(stepped), prompts)
        # What may be at fault is computed without company, so that it costs nobody else.
        self._pass([], suspects)

    def _drop_all(self) -> None:
        # Blocks of others may have been written to.
        self._rows = []
        self._pool = self._empty_pool()
        if self._speculation is not None:
            self._speculation.clear()
        if self._told_cache is not None:
            self._told_cache.cleared()

    def _drop_rows(self) -> None:
        for row in [row for row in self._rows if not row.answer.wanted]:
            self._leave(row)

    def _renew(self, *, keep: bool) -> None:
        for row in reversed([row for row in self._rows if not (keep and row.begun)]):
            self._leave(row)
            self._waiting.appendleft([row.sequence, *row.others])
        self._pool.renew([row.tables for row in self._rows])
        if self._told_cache is not None:
            self._told_cache.cleared()

    def probe(self) -> None:
        self._runner.probe()

    # ── what is cached ──────────────────────────────────────────────────────────────────────────────────────────────

    def tell_cache(self, model: str, tell: Callable[[CacheTranslator], None]) -> None:
        self._told_cache, self._tell_cache = CacheTranslator(model), tell
        self._pool = self._empty_pool()

    def _empty_pool(self) -> BlockPool:
        pool = BlockPool(self._runner.blocks, self._runner.tokens, self._runner.layout)
        if self._told_cache is not None:
            pool.on_stored = self._stored
            pool.on_removed = self._removed
        return pool

    def _stored(self, number: int, after: Hashable, tokens: Many[int]) -> None:
        assert self._told_cache is not None
        parent, adapter = after, ""
        others: list[Any] = []
        if isinstance(after, tuple):
            # The first block of a text follows its root.
            parent, (_, adapter, *others) = None, after[0]
        keys = [tuple(others)] if others not in ([], [None, ""]) else None
        self._told_cache.stored([number], parent, tokens, self._pool.tokens, adapter or None, keys)

    def _removed(self, number: int) -> None:
        assert self._told_cache is not None
        self._told_cache.removed([number])

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, budget: int) -> None:
        """Take in what there is room for, as long as the next pass has tokens for it."""
        pending = sum(row.left for row in self._rows if not row.begun)
        skipped: list[list[Sequence]] = []
        admitted = False
        while self._waiting and pending < budget:
            group = self._waiting[0]
            row = self._admitted(group)
            if row is not None:
                admitted = True
                self._waiting.popleft()
                taken = 1 + len(row.others)
                if taken < len(group):
                    self._waiting.appendleft(group[taken:])
                pending += row.left
            elif self._may_be_overtaken(group, len(skipped), full=self._places() <= 0):
                skipped.append(self._waiting.popleft())
            else:
                break
        self._waiting.extendleft(reversed(skipped))
        if admitted:
            for group in skipped:
                group[0].answer.overtaken += 1

    def _places(self) -> int:
        """Sequences that may still join."""
        return self._batch_size_max - len(self._rows) - sum([len(row.others) for row in self._rows if row.others])

    def _admitted(self, group: list[Sequence]) -> PagedRow | None:
        """A row for a request's choices, or for as many of them as there is room for; None if there is none."""
        first, places = group[0], self._places()
        answer = first.answer
        told = answer.prompt_logprobs is not None
        if places <= 0 or (told and any(row.answer is answer for row in self._rows)):
            return None
        tokens = first.tokens()
        adapter = answer.adapter
        named = (adapter.number, adapter.name) if adapter else (0, "")
        root = (*named, answer.request.extra.get("cache_salt"), self._pictures(answer))
        # Whoever is told of each token of the prompt needs each of them computed.
        shared = self._pool.find(() if told else tokens, root)
        count, each = self._pool.blocks_for(len(tokens) + 1), self._pool.tables
        free = self._pool.available - self._pool.taken(shared, count) - each * len(self._rows)
        # Each row may need another block in each table soon, so there is one left for each; whoever is alone needs none.
        if free < 0 and self._rows:
            return None
        tables = self._pool.open(root, shared)
        if not self._pool.grow(tables, count):
            self._pool.close(tables)
            return None
        done = shared.whole * self._pool.tokens
        if told:
            answer.prompt_logprobs = []
        self._asked, self._found = self._asked + len(tokens), self._found + done
        if answer.cached_tokens is None:
            answer.cached_tokens = min(done, len(answer.prompt))
        others = group[1 : min(len(group), places, 1 + max(0, free // each))] if len(group) > 1 else []
        row = PagedRow(first, tables, tokens, done, others)
        vision = self._model.vision
        if answer.media is not None and vision is not None:
            row.sight = Sight(vision, answer)
        self._rows.append(row)
        return row

    def _pictures(self, answer: Answer) -> str:
        """Whose blocks a prompt with pictures may take over: of one with the same, unless tokens see later ones, which another
        prompt may not have."""
        vision = self._model.vision
        own = vision is not None and vision.spans and answer.media is not None
        return f"{answer.media_key} {next(self._unshared)}" if own else answer.media_key

    # ── a pass ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _see(self) -> None:
        """A picture of the first row that has one left to see: running rows wait for one at a time."""
        row = next((row for row in self._rows if row.blind), None)
        if row is None or row.sight is None:
            return
        try:
            row.sight.advance()
        except Exception as error:  # noqa: BLE001 — a picture that cannot be seen costs its request
            self._failed([], [(row, 0)], error)

    def _make_room(self) -> None:
        """Blocks for each row that has filled its last, and for prompts what their next part needs; while there are none, let
        the youngest row wait."""
        size = self._pool.tokens
        for row in list(self._rows):
            tokens, short = len(row.tokens), self._pool.slides
            if row.begun:
                tokens, short = row.done, row.done == len(row.tables.blocks) * size
            while short and row.tables.blocks and not self._pool.grow(row.tables, self._pool.blocks_for(tokens + 1)):
                self._put_back(self._rows[-1])

    def _guessed(self, stepped: list[PagedRow]) -> Steps:
        """What these may go on with, where there are blocks for it that nobody else will want."""
        if self._speculation is None or not stepped:
            return [(row, []) for row in stepped]
        steps = []
        for row, drafts in zip(stepped, self._speculation.drafts([row.sequence for row in stepped]), strict=True):
            needed = self._pool.blocks_for(row.done + 1 + len(drafts))
            missing = needed - len(row.tables.blocks)
            left = self._pool.available - missing * self._pool.tables
            if missing > 0 and not (
                left >= len(self._rows) * self._pool.tables and self._pool.grow(row.tables, needed)
            ):
                drafts = drafts[: len(row.tables.blocks) * self._pool.tokens - row.done - 1]
            steps.append((row, drafts))
        return steps

    def _put_back(self, row: PagedRow) -> None:
        self.preemptions += 1
        self._leave(row)
        self._waiting.appendleft([row.sequence, *row.others])

    def _leave(self, row: PagedRow) -> None:
        self._rows.remove(row)
        self._pool.close(row.tables)
        if self._speculation is not None:
            self._speculation.forget(row.sequence)

    def _pass(self, steps: Steps, prompts: Work) -> None:
        """A step of these and parts of prompts; and a draw for all rows that are complete."""
        if not (steps or prompts):
            return
        began = time.monotonic()
        try:
            line = Line(steps, prompts)
            logits = self._runner.forward(line.parts)
            entries = line.entries(logits, self._sampler.entries)
            drawn = line.drawn(logits, self._sampler)
        except Exception as error:  # noqa: BLE001 — a prompt that cannot be computed costs its request
            self._failed(steps, prompts, error)
            return
        self._measured(steps, prompts, time.monotonic() - began)
        for row, its in entries:
            row.answer.prompt_logprobs = [*(row.answer.prompt_logprobs or ()), *its]
        for row, count in prompts:
            row.done += count
            self._pool.learn(row.tables, row.tokens[: row.done])
        right = accepted(line.drawings, drawn)
        for drawing, count in zip(line.drawings, right, strict=True):
            if drawing.row.begun:
                self._stepped(drawing, count)
        if self._pool.slides:
            for row, _ in (*steps, *prompts):
                self._pool.give_back(row.tables, row.done)
        self._draw_all([drawing.row for drawing in line.drawings], drawn, right)

    def _stepped(self, drawing: Drawing, count: int) -> None:
        """The newest token of a row is in the cache, and so many drafts that were right."""
        row, drafts, _ = drawing
        if drafts:
            assert self._speculation is not None
            self._speculation.took(row.sequence, len(drafts), count)
        size = self._pool.tokens
        whole = row.done // size
        row.done += 1 + count
        if row.done // size > whole:
            self._pool.learn(row.tables, [*row.sequence.tokens(), *drafts[:count]][: row.done])

    def _measured(self, steps: Steps, prompts: Work, seconds: float) -> None:
        rows, tokens = len(steps) + sum(len(drafts) for _, drafts in steps), sum(count for _, count in prompts)
        self._share.passed(rows=rows, tokens=tokens, seconds=seconds)
        if not prompts:
            # Beam searches have passes of their own between two steps.
            self._token_budget.stepped(seconds)

    def _draw_all(self, rows: list[PagedRow], drawn: list[list[Drawn]], right: list[int]) -> None:
        """Give each choice its token; and after those that drafts were right for, place by place, what was drawn next."""
        further = [(row, its[1:]) for row, its, count in zip(rows, drawn, right, strict=True) if count]
        self._draw(rows, [one for its, count in zip(drawn, right, strict=True) for one in (its[:1] if count else its)])
        while further:
            # What a row still had after its end is dropped; a table that is closed is empty.
            further = [(row, its) for row, its in further if its and row.tables.blocks]
            self._draw([row for row, _ in further], [its[0] for _, its in further])
            further = [(row, its[1:]) for row, its in further]

    def _draw(self, rows: list[PagedRow], drawn: list[Drawn]) -> None:
        """Give each choice its token; those that go on have a row each."""
        sequences = [row.sequence for row in rows]
        if any(row.others for row in rows):
            sequences = [one for row in rows for one in row.choices]
        going = {sequences[index] for index in self._enter(sequences, drawn)}
        for row in rows:
            if row.begun and row.sequence in going and row.sequence.answer.wanted:
                continue
            choices = [one for one in row.choices if one in going and one.answer.wanted]
            row.others, row.tokens, row.begun, row.sight = [], [], True, None
            if not choices:
                self._leave(row)
                continue
            row.sequence = choices[0]
            for other in choices[1:]:
                self._fork(row, other)

    def _fork(self, row: PagedRow, sequence: Sequence) -> None:
        """A row for another choice: whole blocks are shared, and the one that is not is copied."""
        whole = row.done // self._pool.tokens
        tables = self._pool.fork(row.tables, whole)
        if row.done % self._pool.tokens:
            if not self._pool.grow(tables, whole + 1):
                self._pool.close(tables)
                self.preemptions += 1
                self._waiting.appendleft([sequence])
                return
            for its, other in zip(row.tables.each, tables.each, strict=True):
                self._runner.cache.copy(its.blocks[whole], other.blocks[whole])
        self._rows.append(PagedRow(sequence, tables, [], row.done, begun=True))

    def _failed(self, steps: Steps, prompts: Work, error: Exception) -> None:
        """A pass cannot be computed. Nothing of it counts; prompts in it are tried again, each alone.

        Raises:
            Exception: This one, if only running rows were in it; or the model is broken.
        """
        exhausted = out_of_memory(error)
        if not prompts and not exhausted:
            raise error
        if exhausted and any(drafts for _, drafts in steps):
            assert self._speculation is not None
            self._speculation.pause()
            return
        if not exhausted:
            # Whether it is the prompt's fault or the engine's, the model itself tells: if it is broken, this raises.
            self.probe()
        if not prompts:
            self._fail(steps[-1][0].answer, as_fabric_error(error))
        elif not steps and len(prompts) == 1:
            self._fail(prompts[0][0].answer, as_fabric_error(error))
        else:
            for row, _ in prompts:
                row.answer.suspect = True
        if self._stale:
            self.drop_ended()
