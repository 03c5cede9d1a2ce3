"""Drafts by an assistant: a smaller model with the same vocabulary, which reads the same texts over a pool of pages of its own.

It draws as the model itself does, by the row's parameters, seed and position, so that both draw the same token wherever their
distributions are alike; a greedy row is guessed greedily. It knows no adapters: texts of such rows are guessed by what it is.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Final

import torch

from zfabric.backends.hf_transformers.cache.block_pool import BlockPool
from zfabric.backends.hf_transformers.cache.block_table import BlockTables
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.backends.hf_transformers.sampling.logits_processors import OFF
from zfabric.backends.hf_transformers.sampling.sampler import Draws, draw
from zfabric.backends.hf_transformers.speculative.speculation import Proposer, tokens_after
from zfabric.wire.payloads import GenerateRequest

_NOBODY: Final = Answer(GenerateRequest())
#: Tokens of texts that are new to it that it reads in a turn: they hold all rows up, and a text that it has not read yet has no
#: drafts, no more.
_READ_TOKENS_MAX: Final = 128


@dataclass(slots=True, eq=False)
class _Text:
    """What the assistant has of a row.

    Attributes:
        tables: Where; None if it is not to be read any more: there was no room, it is too long, or a token is unknown here.
        done: Tokens of the row whose keys and values are there.
        fed: Drafts whose are there behind them.
    """

    tables: BlockTables | None
    done: int
    fed: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Asked:
    """A row that is guessed for in this turn.

    Attributes:
        pending: Its tokens that are still to be read.
        count: Tokens to guess.
    """

    sequence: Sequence
    text: _Text
    pending: list[int]
    count: int
    place: int
    draft: list[int] = field(default_factory=list)


class AssistantProposer(Proposer):
    """Has a model guess.

    Args:
        runner: Its forward pass over pages.
        vocabulary_size: Tokens that the model itself draws.
        context_length: Tokens of a text that the assistant can read.
    """

    def __init__(self, runner: PagedRunner, vocabulary_size: int, context_length: int) -> None:
        self._runner = runner
        self._vocabulary_size, self._context_length = vocabulary_size, context_length
        self._pool = BlockPool(runner.blocks, runner.tokens)
        self._texts: dict[Sequence, _Text] = {}
        self._draws = Draws()

    def propose(self, asked: Many[tuple[Sequence, int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in asked]
        rows = self._ready(asked)
        first = True
        while rows:
            self._advance(rows, first=first)
            first = False
            for row in rows:
                drafts[row.place] = row.draft
            rows = [row for row in rows if len(row.draft) < row.count]
        return drafts

    def forget(self, sequence: Sequence) -> None:
        text = self._texts.pop(sequence, None)
        if text is not None and text.tables is not None:
            self._pool.close(text.tables)

    def clear(self) -> None:
        self._texts.clear()
        self._pool = BlockPool(self._runner.blocks, self._runner.tokens)

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ready(self, asked: Many[tuple[Sequence, int]]) -> list[_Asked]:
        """Those that only need a little read; of the others a part is read, and there are no drafts for them yet."""
        ready: list[_Asked] = []
        late: list[_Asked] = []
        left = _READ_TOKENS_MAX
        reading: set[int] = set()
        for place, (sequence, count) in enumerate(asked):
            # Choices of a request wait for the first to have read what they share.
            text = None if id(sequence.answer) in reading else self._text(sequence)
            if text is None:
                continue
            row = _Asked(sequence, text, tokens_after(sequence, text.done), count, place)
            if (
                max(row.pending) >= self._runner.model.vocabulary_size
                or text.done + len(row.pending) + count > self._context_length
            ):
                self._give_up(text)
                continue
            short = len(row.pending) <= self._runner.tokens
            if not short:
                reading.add(id(sequence.answer))
            part = min(len(row.pending), len(row.pending) if short else left)
            whole = part == len(row.pending)
            if not part or not self._grow(text, text.done + part + (count - 1 if whole else 0)):
                continue
            left -= 0 if short else part
            (ready if whole else late).append(row)
            row.pending = row.pending[:part]
        self._read(late)
        return ready

    def _text(self, sequence: Sequence) -> _Text | None:
        """What there is of a row, with the drafts that were right counted; None if it is not read."""
        text = self._texts.get(sequence)
        if text is None:
            tokens = sequence.tokens()
            root = (sequence.answer.request.extra.get("cache_salt"),)
            shared = self._pool.find(tokens, root)
            text = _Text(self._pool.open(root, shared), shared.whole * self._pool.tokens)
            self._texts[sequence] = text
        if text.tables is None:
            return None
        if text.fed:
            # One at least is left to be read, which the next token is drawn after.
            came = tokens_after(sequence, text.done)[:-1]
            count = 0
            while count < min(len(came), len(text.fed)) and came[count] == text.fed[count]:
                count += 1
            self._have(sequence, text, count)
            text.fed = []
        return text

    def _have(self, sequence: Sequence, text: _Text, count: int) -> None:
        """So many tokens more are there, and of the row."""
        assert text.tables is not None
        whole = text.done // self._pool.tokens
        text.done += count
        if text.done // self._pool.tokens > whole:
            self._pool.learn(text.tables, sequence.tokens()[: text.done])

    def _grow(self, text: _Text, tokens: int) -> bool:
        """Have room for so many; a text that there is none for is given up."""
        assert text.tables is not None
        grown = self._pool.grow(text.tables, self._pool.blocks_for(tokens))
        if not grown:
            self._give_up(text)
        return grown

    def _give_up(self, text: _Text) -> None:
        assert text.tables is not None
        self._pool.close(text.tables)
        text.tables = None

    def _read(self, rows: list[_Asked]) -> None:
        """Parts of long texts, after which nothing is drawn."""
        if rows:
            self._runner.forward([self._part(row, row.pending, "none") for row in _ordered(rows)])
        for row in rows:
            self._have(row.sequence, row.text, len(row.pending))

    def _part(self, row: _Asked, tokens: list[int], logits: str) -> Part:
        text = row.text
        assert text.tables is not None
        end = text.done + len(text.fed) + len(tokens)
        return Part(_NOBODY, tokens, end, text.tables, "last" if logits == "last" else "none")

    # ── guessing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _advance(self, rows: list[_Asked], *, first: bool) -> None:
        """One token more for each."""
        rows = _ordered(rows) if first else rows
        parts = [self._part(row, row.pending if first else row.draft[-1:], "last") for row in rows]
        logits = self._alike(self._runner.forward(parts))
        for row in rows:
            if first:
                self._have(row.sequence, row.text, len(row.pending))
            else:
                row.text.fed.append(row.draft[-1])
        its, ahead = [row.sequence.row for row in rows], [len(row.draft) for row in rows]
        tokens = draw(logits, self._draws.metadata(its, logits, ahead)).tolist()
        for row, token in zip(rows, tokens, strict=True):
            # Where all tokens are banned there is nothing to guess.
            row.count = row.count if token >= 0 else 0
            row.draft += [token] * (token >= 0)

    def _alike(self, logits: torch.Tensor) -> torch.Tensor:
        """With a place for each token that the model itself has, which masks and biases of rows are made for."""
        missing = self._vocabulary_size - logits.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=OFF)
        return logits[:, : self._vocabulary_size]


def _ordered(rows: list[_Asked]) -> list[_Asked]:
    """Those of one token first."""
    return sorted(rows, key=lambda row: len(row.pending) > 1)
