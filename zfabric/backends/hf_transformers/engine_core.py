"""What the engine's thread does in one turn: some prompt tokens, one step of the batch, one step of a beam search.

Prompts are computed between two steps of the batch, short ones together and long ones in parts, so that running streams
wait for a part and no more. When the cache is full, the youngest row gives its place back and waits at the head of the
line; what it has is computed again then, and since a draw depends on seed and position alone, its text is the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.beam_search import BeamSearchQueue
from zfabric.backends.hf_transformers.failures import as_fabric_error, nothing_left, out_of_memory
from zfabric.backends.hf_transformers.input_batch import InputBatch, Prefill
from zfabric.backends.hf_transformers.logits_processors import NOTHING
from zfabric.backends.hf_transformers.model_runner import ModelRunner
from zfabric.backends.hf_transformers.sampler import Drawn, Sampler
from zfabric.backends.hf_transformers.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.token_budget import TokenBudget
from zfabric.errors import FabricError, RequestError
from zfabric.wire.payloads import Delta

Step = list[tuple[Answer, Delta]]

#: A row joins only if the batch can go on for so many steps: less, and it would soon have to leave again.
_HEADROOM_COLUMNS: Final = 16
#: How often those behind it may go before a prompt that there is no room for, and how many of such are passed by at a time.
_OVERTAKEN_MAX: Final = 64
_LOOKED_AT_MAX: Final = 16


class EngineCore:
    """Steps requests. It knows no threads: one at a time may call it, but for the properties that say so.

    Args:
        model: The forward pass.
        tokenizer: For the texts of log-probabilities.
        batch_size_max: Sequences in the batch.
        kv_tokens_max: Cells of the cache, padding included.
        token_budget: How much of a prompt is computed between two steps.
        on_end: Called for each request that has ended, well or not.
        on_failure: Called for a request that failed alone.
    """

    def __init__(
        self,
        model: ModelRunner,
        tokenizer: Any,
        *,
        batch_size_max: int,
        kv_tokens_max: int,
        token_budget: TokenBudget,
        on_end: Callable[[Answer], None],
        on_failure: Callable[[Answer, FabricError], None],
    ) -> None:
        self._model = model
        self._sampler = Sampler(tokenizer)
        self._batch_size_max = batch_size_max
        self._kv_tokens_max = kv_tokens_max
        self._token_budget = token_budget
        self._on_end, self._on_failure = on_end, on_failure
        self._waiting: deque[list[Sequence]] = deque()
        self._prefill: Prefill | None = None
        self._searches = BeamSearchQueue(model, kv_tokens_max)
        self._batch = InputBatch(model)
        self._step: Step = []
        self._stale = False
        #: Rows that had to leave the batch for want of room, and are computed again.
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._batch.rows or self._prefill or self._waiting or self._searches)

    @property
    def running(self) -> int:
        """Requests of which something is in the batch. From any thread."""
        return len({id(row.answer) for row in list(self._batch.rows)})

    @property
    def kv_tokens_free(self) -> int:
        """Cells of the cache that are not in use. From any thread."""
        prefill = self._prefill
        return max(0, self._kv_limit - self._batch.cells() - (0 if prefill is None else prefill.done))

    @property
    def _kv_limit(self) -> int:
        """Cells for the batch: the search at the head of the line has its own."""
        return self._kv_tokens_max - self._searches.cells

    def turn(self) -> None:
        """Some prompt tokens, one step of the batch, one of a search. What it makes is there for `take`.

        Raises:
            Exception: What broke the batch; `reset` is all that can be done then.
        """
        self._compute_prompts()
        self._make_room()
        if self._model.switch is not None:
            self._send_back(self._model.switch)
        if self._batch.rows:
            self._decode()
        if self._searches:
            self._search()
        if self._stale:
            self.drop_ended()

    def take(self) -> Step:
        """All deltas made since the last call."""
        step, self._step = self._step, []
        return step

    def reset(self, error: FabricError) -> None:
        """Begin anew after a turn that broke: what was being computed fails with this, the others keep their place."""
        prefill = self._prefill
        rows = self._batch.rows + ([] if prefill is None else prefill.rows)
        self._batch, self._prefill = InputBatch(self._model), None
        for answer in {id(row.answer): row.answer for row in rows}.values():
            if answer.wanted:
                self._fail(answer, error)
        self.drop_ended()

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def accept(self, sequences: list[Sequence]) -> None:
        """Put a prepared request in line, unless it has ended already."""
        answer = sequences[0].answer
        if answer.cancelled:
            return
        if answer.request.sampling.use_beam_search:
            try:
                self._searches.add(sequences)
            except RequestError as error:
                self._fail(answer, error)
            return
        if answer.request.resume_token_ids:
            ended = sequences[0].resume(list(answer.request.resume_token_ids))
            if ended is not None:
                self._give(answer, ended)
                return
        self._waiting.append(sequences)

    def _compute_prompts(self) -> None:
        """Compute some tokens of the prompts in line; those that are whole join the batch."""
        running = bool(self._batch.rows)
        budget = total = self._token_budget.budget(running=running)
        began = time.monotonic()
        while budget > 0:
            if self._prefill is None:
                self._prefill = self._next_prefill(budget)
            if self._prefill is None:
                break
            budget -= self._advance(self._prefill, budget)
        if running and budget < total:
            self._token_budget.took(total - budget, time.monotonic() - began)

    def _next_prefill(self, budget: int) -> Prefill | None:
        """The prompts at the head of the line for which there is room: several if they fit the budget."""
        groups: list[list[Sequence]] = []
        skipped: list[list[Sequence]] = []
        width = rows = 0
        while self._waiting:
            group = self._waiting[0]
            size = group[0].size
            count = min(len(group), self._room(rows, max(width, size)))
            alone = size > budget or group[0].answer.alone
            crowded = (len(groups) + 1) * max(width, size) > budget
            if not count and not groups and self._may_be_overtaken(group, len(skipped)):
                skipped.append(self._waiting.popleft())
                continue
            if not count or (groups and (alone or crowded)):
                break
            self._waiting.popleft()
            if count < len(group):
                self._waiting.appendleft(group[count:])
            groups.append(group[:count])
            rows += count
            width = max(width, size)
            if alone or count < len(group):
                break
        self._waiting.extendleft(reversed(skipped))
        if not groups:
            return None
        for group in skipped:
            group[0].answer.overtaken += 1
        return Prefill(self._model, groups)

    def _may_be_overtaken(self, group: list[Sequence], skipped: int) -> bool:
        """Whether others may go before one that there is no room for: not too often, and not if it had a place already."""
        full = len(self._batch.rows) >= self._batch_size_max
        begun = bool(group[0].output)
        return not (full or begun or skipped >= _LOOKED_AT_MAX or group[0].answer.overtaken >= _OVERTAKEN_MAX)

    def _room(self, rows: int, width: int) -> int:
        """How many rows of such a width may join beside so many others. One may always, if it is the only one."""
        present = len(self._batch.rows) + rows
        columns = max(self._batch.columns, width) + _HEADROOM_COLUMNS
        room = min(self._batch_size_max, self._kv_limit // columns) - present
        return max(room, 0 if present else 1)

    def _advance(self, prefill: Prefill, budget: int) -> int:
        """Compute a part. Returns how many tokens it took."""
        answer = prefill.groups[0][0].answer
        wanted = answer.prompt_logprobs
        begin = prefill.done
        try:
            logits = prefill.advance(budget, all_logits=wanted is not None)
            if wanted is not None:
                count = answer.request.sampling.prompt_logprobs or 0
                wanted += self._sampler.entries.of_prompt(logits[0], answer.prompt, begin, count)
                logits = logits[:, -1]
            if not prefill.left:
                self._start(prefill, logits)
        except Exception as error:  # noqa: BLE001 — a prompt that cannot be computed costs its request
            self._give_up(prefill, error)
        else:
            if not prefill.left:
                self._prefill = None
        return prefill.spent or budget

    def _start(self, prefill: Prefill, logits: torch.Tensor) -> None:
        """The prompts are computed: draw first tokens, and put those that go on into the batch."""
        owners = [number for number, group in enumerate(prefill.groups) for _ in group]
        sequences = prefill.rows
        drawn = self._sampler.sample(sequences, logits[owners])
        going = [index for index in self._enter(sequences, drawn) if sequences[index].answer.wanted]
        if going:
            cache, lengths = prefill.spread(going)
            tokens = [drawn[index][0] for index in going]
            self._batch.join([sequences[index] for index in going], cache, lengths, tokens)

    def _give_up(self, prefill: Prefill, error: Exception) -> None:
        """A prompt cannot be computed. Of several, each is tried alone."""
        if not out_of_memory(error):
            # Whether it is the prompt's fault or the engine's, the model itself tells: if it is broken, this raises.
            self._model.probe()
        self._prefill = None
        if len(prefill.groups) > 1:
            for group in prefill.groups:
                group[0].answer.suspect = True
            self._waiting.extendleft(reversed(prefill.groups))
        else:
            self._fail(prefill.rows[0].answer, as_fabric_error(error))

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_room(self) -> None:
        """While another column would not fit into the cache, let the youngest row wait."""
        batch = self._batch
        while len(batch.rows) > 1 and batch.cells(width=batch.columns + 1) > self._kv_limit:
            self._waiting.appendleft([batch.rows[-1]])
            self.preemptions += 1
            batch.leave(list(range(len(batch.rows) - 1)))

    def _send_back(self, length: int) -> None:
        """Rows that the next step would take to this length are computed anew, as a whole."""
        rows = self._batch.rows
        grown = [row for row in rows if len(row.answer.prompt) + len(row.output) == length]
        if grown:
            self._waiting.extendleft([row] for row in reversed(grown))
            self._batch.leave([index for index, row in enumerate(rows) if row not in grown])

    def _decode(self) -> None:
        """One token for every row."""
        rows = self._batch.rows
        began = time.monotonic()
        try:
            drawn = self._sampler.sample(rows, self._batch.forward())
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._batch.rollback()
            self._fail(rows[-1].answer, as_fabric_error(error))
            return
        self._token_budget.stepped(time.monotonic() - began)
        self._batch.commit([token for token, _ in drawn])
        self._batch.leave(self._enter(rows, drawn))

    def _search(self) -> None:
        """Take a beam search a step further."""
        budget = self._token_budget.budget(running=bool(self._batch.rows))
        crowded = self._batch.cells() > self._kv_limit
        answer, deltas, error = self._searches.advance(budget, crowded=crowded)
        if error is not None:
            self._fail(answer, as_fabric_error(error))
        for delta in deltas:
            self._give(answer, delta)

    def _enter(self, rows: list[Sequence], drawn: list[Drawn]) -> list[int]:
        """Give each row its token. Returns the indexes of those that go on."""
        going = []
        for index, (row, (token, logprobs)) in enumerate(zip(rows, drawn, strict=True)):
            if token == NOTHING:
                self._fail(row.answer, row.failure or nothing_left())
                continue
            delta = row.take(token, logprobs)
            if row.failure is not None:
                self._fail(row.answer, row.failure)
                continue
            self._give(row.answer, delta)
            if delta.finish_reason is None:
                going.append(index)
        return going

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _give(self, answer: Answer, delta: Delta) -> None:
        given = [delta] if answer.best_of is None else answer.best_of.add(delta)
        self._step.extend((answer, one) for one in given)
        if delta.usage is not None:
            self._end(answer)

    def _fail(self, answer: Answer, error: FabricError) -> None:
        self._end(answer)
        self._stale = True
        self._on_failure(answer, error)

    def _end(self, answer: Answer) -> None:
        answer.over = True
        self._on_end(answer)

    def drop_ended(self) -> None:
        """Forget aborted and failed requests wherever they are."""
        self._stale = False
        self._waiting = deque(group for group in self._waiting if group[0].answer.wanted)
        prefill = self._prefill
        if prefill is not None and not any(row.answer.wanted for row in prefill.rows):
            self._prefill = None
        self._searches.drop_ended()
        self._batch.leave([index for index, row in enumerate(self._batch.rows) if row.answer.wanted])
