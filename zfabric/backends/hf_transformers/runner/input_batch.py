"""The running batch: a left-padded key-value cache that sequences join and leave between two steps.

Left padding keeps every row's newest token in the last column, so one step appends one column for all. A row that joins
is padded to the batch's length, or the batch to the row's; columns that no row uses any more are cut off when rows leave.
Lengths are known to the host, so nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import torch

from zfabric.backends.hf_transformers.request.sequence import Sequence
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner


class InputBatch:
    """Rows, their cache, and the forward pass of one step.

    A step is `forward`, then `commit` with the tokens that were drawn, or `rollback` when it failed.
    """

    def __init__(self, model: ModelRunner) -> None:
        self._model = model
        self.rows: list[Sequence] = []
        self.width = 0
        self._tokens: list[int] = []
        self._lengths: list[int] = []
        self._cache: Any = None

    def cells(self, more_rows: int = 0, width: int = 0) -> int:
        """Cells of the cache in use, padding included, if so many rows of such a width joined."""
        return (len(self.rows) + more_rows) * max(self.columns, width)

    @property
    def columns(self) -> int:
        """Cells that each row takes."""
        return self._model.cells(self.width) + self._cache.source_columns if self.rows else 0

    def join(self, rows: Many[Sequence], cache: Any, lengths: Many[int], tokens: Many[int]) -> None:
        """Add prefilled rows.

        Args:
            cache: Of these rows, left-padded.
            lengths: Columns in use of each.
            tokens: The token that each row is to be fed next.
        """
        if not self.rows:
            self._cache = cache
            self.width = cache.get_seq_length()
        else:
            self._cache.merge(cache)
            self.width = max(self.width, cache.get_seq_length())
        self.rows.extend(rows)
        self._lengths.extend(lengths)
        self._tokens.extend(tokens)

    def leave(self, keep: list[int]) -> None:
        """Go on with these rows only."""
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in keep]
        self._tokens = [self._tokens[index] for index in keep]
        self._lengths = [self._lengths[index] for index in keep]
        if not keep:
            self._cache = None
            self.width = 0
            return
        unused = self.width - max(self._lengths)
        self._cache.select(keep, unused)
        self.width -= unused

    def forward(self) -> torch.Tensor:
        """Feed each row its token. Returns float32 logits (rows, vocabulary)."""
        lengths = [length + 1 for length in self._lengths]
        answers = [row.answer for row in self.rows]
        return self._model([[token] for token in self._tokens], lengths, self._cache, answers=answers)

    def commit(self, tokens: Many[int]) -> None:
        """The step succeeded, and drew these tokens."""
        self._tokens = list(tokens)
        self._lengths = [length + 1 for length in self._lengths]
        self.width += 1

    def rollback(self) -> bool:
        """The step failed: forget what some layers had appended already. False if they cannot, so that all rows have to be
        computed anew."""
        if self._cache.rewinds:
            self._cache.crop_to(self.width)
        return bool(self._cache.rewinds)


class Prefill:
    """Prompts on their way into the batch: several short ones in one pass, or one long one, a part at a time.

    Args:
        groups: Choices that start from the same tokens; groups start from different ones.
    """

    def __init__(self, model: ModelRunner, groups: list[list[Sequence]]) -> None:
        self._model = model
        self.groups = groups
        self.prompts = [group[0].tokens() for group in groups]
        self.done = 0
        self.cache: Any = None
        #: Tokens that the newest part took.
        self.spent = 0

    @property
    def rows(self) -> list[Sequence]:
        """All choices."""
        return [sequence for group in self.groups for sequence in group]

    @property
    def width(self) -> int:
        """Columns of the longest prompt."""
        return max(len(prompt) for prompt in self.prompts)

    @property
    def left(self) -> int:
        """Columns still to compute."""
        return self.width - self.done

    def advance(self, columns_max: int, *, all_logits: bool = False) -> torch.Tensor:
        """Compute up to so many columns; all at once if there are several prompts, or images, or a state to go on from that
        the model would not.

        Returns:
            Float32 logits of the last column, (groups, vocabulary), or of all, (groups, columns, vocabulary).
        """
        answers = [group[0].answer for group in self.groups]
        width = self.width
        self.spent = 0
        if self.cache is None:
            self.cache = self._model.start(answers)
            self.spent = sum(len(answer.source) for answer in answers if not answer.encoded)
        whole = len(answers) > 1 or answers[0].media is not None or not self._model.parts
        end = width if whole else min(width, self.done + columns_max)
        if len(answers) == 1:
            part, lengths = [self.prompts[0][self.done : end]], [end]
        else:
            part = [[0] * (width - len(prompt)) + prompt for prompt in self.prompts]
            lengths = [len(prompt) for prompt in self.prompts]
        wholes = [len(prompt) for prompt in self.prompts]
        logits = self._model(part, lengths, self.cache, answers=answers, wholes=wholes, all_logits=all_logits)
        self.spent += (end - self.done) * len(answers)
        self.done = end
        return logits

    def spread(self, keep: list[int]) -> tuple[Any, list[int]]:
        """The cache and the lengths of these of all choices, each with a row of its own."""
        owners = [number for number, group in enumerate(self.groups) for _ in group]
        chosen = [owners[index] for index in keep]
        if chosen != list(range(len(self.groups))):
            self.cache.select(chosen, 0)
        return self.cache, [len(self.prompts[number]) for number in chosen]
