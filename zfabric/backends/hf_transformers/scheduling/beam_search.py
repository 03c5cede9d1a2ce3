"""Beam search, one step between two steps of the batch, so that running streams wait for one pass more and no longer.

The rules are those of transformers' own: among twice as many continuations as there are beams (more if several tokens end an
answer), those that end are entered by their mean log-probability, the best others go on, and the search is over when
none of them could still beat what is entered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from zfabric.backends.hf_transformers.failures import nothing_left
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.runner.input_batch import Prefill
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.sampling.logits_processors import process_logits
from zfabric.errors import RequestError
from zfabric.wire.payloads import Delta
from zfabric.wire.tool_calls import joined_calls


@dataclass(frozen=True, slots=True)
class Beam:
    """A text that may still become an answer, or has: its tokens, and the sum or mean of their log-probabilities."""

    tokens: list[int]
    score: float


class BeamSearch:
    """The search of one request.

    Args:
        model: The forward pass.
        choices: As many as there are beams; the first of them become the answers.
    """

    def __init__(self, model: ModelRunner, choices: list[Sequence]) -> None:
        first = choices[0]
        self.answer = first.answer
        self._model = model
        self._choices = choices
        self._limit, self._ends = first.limit, first.end_tokens
        self._prefill = Prefill(model, [[first]])
        self._cache: Any = None
        self._beams = [Beam([], 0.0)]
        self._ended: list[Beam] = []
        #: Cells of the cache that it may come to need.
        self.cells = len(choices) * model.cells(first.size + self._limit)

    @property
    def begun(self) -> bool:
        """Whether it holds a part of the cache already."""
        return self._prefill.done > 0

    @property
    def drawn(self) -> bool:
        """Whether its beams have grown."""
        return self._cache is not None

    def anew(self) -> BeamSearch:
        """The same search from its beginning."""
        for choice in self._choices:
            choice.row.output, choice.row.history = choice.output, None
        return BeamSearch(self._model, self._choices)

    def abort(self) -> list[Delta]:
        """End it without an answer."""
        return [choice.abort() for choice in self._choices[: self.answer.request.sampling.n]]

    def advance(self, columns_max: int) -> list[Delta]:
        """A part of the prompt, or one step. Returns the answers, whole, once the search is over.

        Raises:
            RequestError: No token may come next, or fewer answers were found than are wanted.
        """
        if self._cache is None:
            logits = self._prefill.advance(columns_max)
            if self._prefill.left:
                return []
            self._cache = self._prefill.cache
        else:
            logits = self._step()
        going = self._judge(self._likeliest(logits))
        if not going:
            if not self._ended:
                raise nothing_left()
            if len(self._ended) < self.answer.request.sampling.n:
                raise RequestError(
                    f"this beam search has found {len(self._ended)} answers, {self.answer.request.sampling.n} are wanted"
                )
            return self._answers()
        self._cache.select([parent for parent, _ in going], 0)
        self._beams = [beam for _, beam in going]
        return []

    def _step(self) -> torch.Tensor:
        rows = [[beam.tokens[-1]] for beam in self._beams]
        length = len(self.answer.prompt) + len(self._beams[0].tokens)
        answers = [self.answer] * len(rows)
        if length == self._model.switch:
            self._cache = self._model.start(answers)
            rows = [[*self.answer.prompt, *beam.tokens] for beam in self._beams]
        return self._model(rows, [length] * len(rows), self._cache, answers=answers)

    def _likeliest(self, logits: torch.Tensor) -> list[tuple[int, Beam]]:
        """The likeliest continuations of all beams, best first, each with the row it goes on from."""
        scores = logits.log_softmax(dim=-1)
        rows = [choice.row for choice in self._choices[: len(self._beams)]]
        for row, beam in zip(rows, self._beams, strict=True):
            row.output = beam.tokens
        process_logits(scores, rows)
        scores = scores + torch.tensor([beam.score for beam in self._beams], device=scores.device).unsqueeze(1)
        count = max(2, 1 + len(self._ends)) * len(self._choices)
        values, places = scores.flatten().topk(min(count, scores.numel()))
        size = scores.shape[1]
        return [
            (place // size, Beam([*self._beams[place // size].tokens, place % size], value))
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
            if value > float("-inf")
        ]

    def _judge(self, found: list[tuple[int, Beam]]) -> list[tuple[int, Beam]]:
        """Enter what ends. Returns what goes on: nothing if the search is over."""
        width = len(self._choices)
        going: list[tuple[int, Beam]] = []
        for rank, (parent, beam) in enumerate(found):
            length = len(beam.tokens)
            if beam.tokens[-1] not in self._ends and length < self._limit:
                going.append((parent, beam))
            elif rank < width:
                self._ended.append(Beam(beam.tokens, beam.score / length))
        going = going[:width]
        self._ended = sorted(self._ended, key=lambda beam: beam.score, reverse=True)[:width]
        if going and len(self._ended) == width:
            best = going[0][1]
            if best.score / len(best.tokens) <= self._ended[-1].score:
                return []
        return going

    def _answers(self) -> list[Delta]:
        answers = []
        for choice, beam in zip(self._choices, self._ended[: self.answer.request.sampling.n], strict=False):
            choice.row.output = choice.output
            whole = Delta(index=choice.index)
            for token in beam.tokens:
                delta = choice.take(token, None)
                whole.text += delta.text
                whole.reasoning += delta.reasoning
                whole.tool_calls = joined_calls([*(whole.tool_calls or ()), *(delta.tool_calls or ())])
                whole.token_ids = [*whole.token_ids, token]
                whole.finish_reason, whole.stop_reason, whole.usage = (
                    delta.finish_reason,
                    delta.stop_reason,
                    delta.usage,
                )
                if delta.finish_reason is not None:
                    break
            answers.append(whole)
        return answers


class BeamSearchQueue:
    """Searches in order of arrival; the one at the head is computed, and has its part of the cache to itself.

    Args:
        model: The forward pass.
        cells_max: As many of the model's own type as the whole cache has memory for.
    """

    def __init__(self, model: ModelRunner, cells_max: int) -> None:
        self._model = model
        self._cells_max = cells_max
        self._line: deque[BeamSearch] = deque()

    def __bool__(self) -> bool:
        return bool(self._line)

    @property
    def cells(self) -> int:
        """Cells that the head of the line may come to need. From any thread."""
        line = list(self._line)
        return line[0].cells if line else 0

    def add(self, choices: list[Sequence]) -> None:
        """Put a search in line.

        Raises:
            RequestError: The whole cache would not suffice.
        """
        search = BeamSearch(self._model, choices)
        if search.cells > self._cells_max:
            message = (
                f"this beam search may need {search.cells} cells of the cache, which has room for {self._cells_max}"
            )
            raise RequestError(message, cells=search.cells, kv_tokens_max=self._cells_max)
        self._line.append(search)

    def restart(self, *, drawn: bool) -> None:
        """Begin searches anew. Args: drawn: Those as well whose beams have grown."""
        self._line = deque(search if search.drawn and not drawn else search.anew() for search in self._line)

    def abort(self) -> list[tuple[Answer, list[Delta]]]:
        """End those that have begun; they stay in line until `drop_ended`."""
        return [(search.answer, search.abort()) for search in self._line if search.begun and search.answer.wanted]

    def drop_ended(self) -> None:
        """Forget what nobody waits for any more."""
        self._line = deque(search for search in self._line if search.answer.wanted)

    def advance(self, columns_max: int, *, crowded: bool) -> tuple[Answer, list[Delta], Exception | None]:
        """Take the head of the line a step further. Returns whose it is, what it has found, and why it cannot go on.

        Args:
            crowded: The batch has not made room yet; only what has begun goes on.
        """
        search = self._line[0]
        if crowded and not search.begun:
            return search.answer, [], None
        try:
            found = search.advance(columns_max)
        except Exception as error:  # noqa: BLE001 — a search that cannot go on costs its request
            self._line.popleft()
            return search.answer, [], error
        if found:
            self._line.popleft()
        return search.answer, found, None
