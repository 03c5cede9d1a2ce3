"""Speculative decoding: what a row may go on with is guessed, computed in one pass with its newest token, and drawn one by one.

A draw depends on logits, seed and position alone, so each token of an answer is the one that is drawn without a guess, whatever
the guess was: drafts are right as long as they are what is drawn, and the first draw that differs is kept, too. That is stronger
than keeping the distribution (Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding"),
and needs no probabilities of whoever guesses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Final

from zfabric.backends.hf_transformers.failures import give_memory_back
from zfabric.backends.hf_transformers.request.sequence import Sequence

#: Tokens that a pass has at most where some are drafts. SmolLM2 on one thread of a CPU takes 61 ms for one token, 71 for 8, 89
#: for 16, 143 for 32 (float32): beyond that a token costs as much as it could save. A device computes far more before it does.
_PASS_TOKENS_MAX: Final = {"cpu": 32}
_PASS_TOKENS_MAX_OTHER: Final = 256
#: A row whose drafts were wrong twice, three times, … in a row rests for 2, 4, … steps, and for so many at most: drafts that are
#: never right cost one token in 65 steps.
_REST_MAX: Final = 64
#: Turns without drafts after whoever guesses has failed: what it lacks, such as memory, may be there again by then.
_PAUSE_TURNS: Final = 256


def pass_tokens_max(device_type: str) -> int:
    """Tokens that a pass has at most where some are drafts."""
    return _PASS_TOKENS_MAX.get(device_type, _PASS_TOKENS_MAX_OTHER)


class Proposer(ABC):
    """Guesses what texts go on with."""

    @abstractmethod
    def propose(self, asked: Many[tuple[Sequence, int]]) -> list[list[int]]:
        """Tokens that may follow, for each of these up to so many; none where there is nothing to go by."""

    @abstractmethod
    def forget(self, sequence: Sequence) -> None:
        """It is computed no more. Called for those that were never asked for as well."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all."""


@dataclass(slots=True)
class DraftLength:
    """How many tokens to guess for a row: twice as many after all were right, else one more than were; and now and then none
    where none are right.

    Args:
        most: At most so many.
    """

    most: int
    tokens: int = 4
    misses: int = 0
    rest: int = 0

    def next(self) -> int:
        """For the step that comes."""
        if self.rest:
            self.rest -= 1
            return 0
        return min(self.tokens, self.most)

    def took(self, drafted: int, accepted: int) -> None:
        """So many were guessed, one at least, and so many of them right."""
        if accepted == drafted:
            self.tokens = min(self.most, max(self.tokens, 2 * drafted))
        else:
            self.tokens = accepted + 1
        self.misses = 0 if accepted else self.misses + 1
        if self.misses > 1:
            self.rest = min(_REST_MAX, 1 << (self.misses - 1))


class Speculation:
    """Drafts for the rows of a core, and what became of them.

    Args:
        proposer: Guesses.
        draft_tokens_max: For a row in a step.
        pass_tokens_max: Of all rows in a pass, their newest ones included.

    Attributes:
        drafted, accepted: Tokens that were guessed so far, and of these what was right.
        failures: Turns in which the proposer failed. It costs nobody but its drafts.
    """

    def __init__(self, proposer: Proposer, *, draft_tokens_max: int, pass_tokens_max: int) -> None:
        self._proposer = proposer
        self._draft_tokens_max, self._pass_tokens_max = draft_tokens_max, pass_tokens_max
        self._lengths: dict[Sequence, DraftLength] = {}
        self._paused = 0
        self.drafted = self.accepted = self.failures = 0

    @property
    def gauges(self) -> dict[str, float]:
        """Figures for operators."""
        return {"draft_tokens": self.drafted, "accepted_draft_tokens": self.accepted, "draft_failures": self.failures}

    def drafts(self, sequences: Many[Sequence]) -> list[list[int]]:
        """What each of the rows that are stepped may go on with; empty for most where drafts are not worth it."""
        found: list[list[int]] = [[] for _ in sequences]
        share = self._pass_tokens_max // len(sequences) - 1
        if self._paused or share <= 0:
            self._paused = max(0, self._paused - 1)
            return found
        places, asked = [], []
        for place, sequence in enumerate(sequences):
            count = min(share, self._count(sequence))
            if count > 0:
                places.append(place)
                asked.append((sequence, count))
        if not asked:
            return found
        try:
            for place, draft in zip(places, self._proposer.propose(asked), strict=True):
                found[place] = draft
        except Exception as error:  # noqa: BLE001 — a guess that cannot be made costs no answer
            error.__traceback__ = None
            self.pause()
        return found

    def _count(self, sequence: Sequence) -> int:
        """How many to guess for it. The last token that it may have is drawn after all that are guessed."""
        if not sequence.row.independent:
            return 0
        length = self._lengths.get(sequence)
        if length is None:
            length = self._lengths[sequence] = DraftLength(self._draft_tokens_max)
        left = sequence.limit - len(sequence.output) - 1
        return min(left, length.next()) if left > 0 else 0

    def took(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """A pass had so many of its drafts, one at least, and so many of them were drawn."""
        self.drafted += drafted
        self.accepted += accepted
        length = self._lengths.get(sequence)
        if length is not None:
            length.took(drafted, accepted)

    def pause(self) -> None:
        """Guess nothing for a while: it has failed, or a pass with drafts has."""
        self.failures += 1
        self._paused = _PAUSE_TURNS
        self.clear()
        give_memory_back()

    def forget(self, sequence: Sequence) -> None:
        """It has left the batch."""
        self._lengths.pop(sequence, None)
        self._proposer.forget(sequence)

    def clear(self) -> None:
        """All have left the batch."""
        self._lengths.clear()
        self._proposer.clear()


def right(drafts: Many[int], drawn: Many[tuple[int, Any]]) -> int:
    """How many of the drafts were drawn before the first that was not."""
    count = 0
    while count < len(drafts) and drawn[count][0] == drafts[count]:
        count += 1
    return count


def tokens_after(sequence: Sequence, begin: int) -> list[int]:
    """A row's tokens from a place on, of prompt and answer, without making a list of those before."""
    prompt = sequence.answer.prompt
    if begin >= len(prompt):
        return sequence.output[begin - len(prompt) :]
    return [*prompt[begin:], *sequence.output]
