"""Drafts without a model: what followed the newest tokens where the text had them before (prompt lookup decoding, Saxena 2023).

Answers that repeat their prompt, as edits, extracts and calls do, are largely there already.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Final

from zfabric.backends.hf_transformers.request.sequence import Sequence
from zfabric.backends.hf_transformers.speculative.speculation import Proposer, tokens_after

#: Earlier places with the same newest tokens that are compared for the longest likeness, the newest ones first.
_PLACES_MAX: Final = 16


class NgramIndex:
    """Where a text has had each run of so many tokens; grows with it.

    Args:
        least: Tokens of such a run.
        most: Tokens before a place that count for how alike two places are.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self.tokens: list[int] = []
        #: The newest end of each run, and for each end the one before it of the same run; -1 for none.
        self._newest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = []

    def add(self, tokens: Many[int]) -> None:
        """The text goes on with these."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            if end < self._least:
                self._earlier.append(-1)
                continue
            run = tuple(self.tokens[end - self._least :])
            self._earlier.append(self._newest.get(run, -1))
            self._newest[run] = end

    def draft(self, count: int) -> list[int]:
        """What followed where the text was most like its end, the newest such place; a text that circles goes on to."""
        place = self._best()
        if place < 0:
            return []
        found: list[int] = []
        tokens, size = self.tokens, len(self.tokens)
        for at in range(place, place + count):
            found.append(tokens[at] if at < size else found[at - size])
        return found

    def _best(self) -> int:
        """End of the earlier run that has the most tokens before it in common with the text's end; -1 for none."""
        best, longest = -1, 0
        place = self._earlier[-1] if self._earlier else -1
        for _ in range(_PLACES_MAX):
            if place < 0:
                break
            alike = self._alike(place)
            if alike > longest:
                best, longest = place, alike
            if longest >= self._most:
                break
            place = self._earlier[place - 1]
        return best

    def _alike(self, place: int) -> int:
        tokens, size = self.tokens, len(self.tokens)
        alike = self._least
        while alike < min(self._most, place) and tokens[place - alike - 1] == tokens[size - alike - 1]:
            alike += 1
        return alike


class NgramProposer(Proposer):
    """Looks the newest tokens of each text up in it.

    Args:
        least, most: Tokens that have to be the same, and that are looked at to choose among places.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._indexes: dict[Sequence, NgramIndex] = {}

    def propose(self, asked: Many[tuple[Sequence, int]]) -> list[list[int]]:
        return [self._index(sequence).draft(count) for sequence, count in asked]

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = NgramIndex(self._least, self._most)
        index.add(tokens_after(sequence, len(index.tokens)))
        return index

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)

    def clear(self) -> None:
        self._indexes.clear()
