"""A row over pages, and what one pass computes of rows: their parts in one line, and what each line of logits is for."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from zfabric.backends.hf_transformers.cache.block_table import BlockTables
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.runner.paged_runner import Part
from zfabric.backends.hf_transformers.runner.vision import Sight
from zfabric.backends.hf_transformers.sampling.logprobs import Entries
from zfabric.backends.hf_transformers.sampling.pending_draws import Drawn
from zfabric.backends.hf_transformers.sampling.sampler import Sampler
from zfabric.backends.hf_transformers.speculative.speculation import right
from zfabric.wire.payloads import TokenLogprobs


@dataclass(slots=True, eq=False)
class PagedRow:
    """A choice that is being computed.

    Attributes:
        tokens: What has to be computed before its next draw, until that.
        done: Tokens whose keys and values are in the cache. Those of wrong drafts lie behind them, and are written over.
        others: Choices that begin as this one does, and have rows of their own once its prompt is computed.
        begun: Whether it is stepped: all that it has but the newest token is in the cache.
        sight: The pictures of its prompt, until that is computed; None if it has none.
    """

    sequence: Sequence
    tables: BlockTables
    tokens: list[int]
    done: int
    others: list[Sequence] = field(default_factory=list)
    begun: bool = False
    sight: Sight | None = None

    @property
    def answer(self) -> Answer:
        """Whose it is."""
        return self.sequence.answer

    @property
    def left(self) -> int:
        """Tokens to compute before it is stepped."""
        return len(self.tokens) - self.done

    @property
    def blind(self) -> bool:
        """Whether it has pictures that are not seen yet: nothing of it can be computed before."""
        return self.sight is not None and self.sight.embedded is None

    def fitting(self, budget: int) -> int:
        """How many of its tokens the next part has: so many, but for those that see one another, which are not parted."""
        count = min(self.left, budget)
        if self.sight is None or self.sight.embedded is None:
            return count
        return self.sight.embedded.end(self.done, self.done + count) - self.done

    @property
    def choices(self) -> list[Sequence]:
        """All that are drawn for when it is complete."""
        return [self.sequence, *self.others]

    def part(self, count: int) -> Part:
        """So many tokens more of a row that is not stepped yet."""
        answer, end = self.sequence.answer, self.done + count
        tokens = self.tokens[self.done : end]
        embedded = None if self.sight is None else self.sight.embedded
        if answer.prompt_logprobs is not None:
            return Part(answer, tokens, end, self.tables, "all", embedded)
        return Part(answer, tokens, end, self.tables, "last" if count == self.left else "none", embedded)

    def step(self, drafts: Many[int] = ()) -> Part:
        """The newest token of one that is stepped, and what may follow it."""
        tokens = [self.sequence.output[-1], *drafts]
        return Part(self.sequence.answer, tokens, self.done + len(tokens), self.tables, "all" if drafts else "last")


#: A row that is not stepped yet, and how many of its tokens a pass computes.
Work = list[tuple[PagedRow, int]]
#: A row that is stepped, and tokens that may follow its newest one.
Steps = list[tuple[PagedRow, list[int]]]


def parts_of(rows: Many[PagedRow], budget: int, part_max: int) -> Work:
    """What a pass computes of prompts.

    Args:
        rows: Those that could go along, the first first.
        budget: Tokens of all; those that see one another may be more.
        part_max: Tokens of each, and of all that are told of: each of these has its logits.
    """
    work: Work = []
    told = part_max
    for row in rows:
        is_told = row.answer.prompt_logprobs is not None
        most = min(budget, told if is_told else part_max)
        count = row.fitting(most) if most > 0 else 0
        if count and (count <= most or not work):
            work.append((row, count))
            budget -= count
            told -= count if is_told else 0
    return work


class Drawing(NamedTuple):
    """A row that is drawn for.

    Attributes:
        line: Of the logits, the first that is its own.
    """

    row: PagedRow
    drafts: Many[int]
    line: int


class Line:
    """One pass.

    Args:
        steps: Rows that are stepped.
        prompts: Parts of others.

    Attributes:
        parts: In the order that the pass takes them: those of one token first.
        drawings: Rows that are complete with it.
        told: Parts of prompts whose tokens are told of, each with the first of its lines of logits.
    """

    def __init__(self, steps: Steps, prompts: Work) -> None:
        self.drawings: list[Drawing] = []
        self.told: list[tuple[PagedRow, Part, int]] = []
        #: Whether it is as most are: one token of each row, and one draw.
        self._plain = not prompts and not any(drafts for _, drafts in steps)
        if self._plain:
            self.parts = [row.step() for row, _ in steps]
            self.drawings = [Drawing(row, drafts, line) for line, (row, drafts) in enumerate(steps)]
            return
        works: list[tuple[Part, PagedRow, Many[int], bool]] = [
            (row.step(drafts), row, drafts, True) for row, drafts in steps
        ]
        works += [(row.part(count), row, (), count == row.left) for row, count in prompts]
        works.sort(key=lambda work: len(work[0].tokens) > 1)
        self.parts = [part for part, *_ in works]
        line = 0
        for part, row, drafts, complete in works:
            lines = {"none": 0, "last": 1, "all": len(part.tokens)}[part.logits]
            if part.logits == "all" and not row.begun:
                self.told.append((row, part, line))
            if complete:
                self.drawings.append(Drawing(row, drafts, line if drafts else line + lines - 1))
            line += lines
        self._lines = line

    def entries(self, logits: torch.Tensor, entries: Entries) -> list[tuple[PagedRow, list[TokenLogprobs | None]]]:
        """What is told of prompts' tokens."""
        found = []
        for row, part, line in self.told:
            number = row.answer.request.sampling.prompt_logprobs or 0
            its = logits[line : line + len(part.tokens)]
            found.append((row, entries.of_prompt(its, row.answer.prompt, row.done, number)))
        return found

    def drawn(self, logits: torch.Tensor, sampler: Sampler) -> list[list[Drawn]]:
        """Of each drawing: a token for each choice, or for each place after its newest token and its drafts."""
        if not self.drawings:
            return []
        if self._plain:
            return [[one] for one in sampler.sample([row.sequence for row, _, _ in self.drawings], logits)]
        sequences: list[Sequence] = []
        lines: list[int] = []
        ahead: list[int] = []
        for row, drafts, line in self.drawings:
            count = 1 + len(drafts)
            choices = [row.sequence] * count if drafts else row.choices
            sequences += choices
            lines += range(line, line + count) if drafts else [line] * len(choices)
            ahead += range(count) if drafts else [0] * len(choices)
        if lines != list(range(self._lines)):
            logits = logits[lines]
        drawn = sampler.sample(sequences, logits, ahead if any(ahead) else None)
        found = []
        end = 0
        for row, drafts, _ in self.drawings:
            begin, end = end, end + (1 + len(drafts) if drafts else len(row.choices))
            found.append(drawn[begin:end])
        return found


def accepted(drawings: Many[Drawing], drawn: list[list[Drawn]]) -> list[int]:
    """How many drafts of each were right. The draws of the others, whose places have other tokens before them, are dropped."""
    counts = []
    for place, (_, drafts, _) in enumerate(drawings):
        count = right(drafts, drawn[place]) if drafts else 0
        if drafts:
            drawn[place] = drawn[place][: count + 1]
        counts.append(count)
    return counts
