"""The core of models whose rows are padded: prompts are computed between two steps, and join the batch as a whole.

Short prompts are computed together and long ones in parts, so that running streams wait for a part and no more. When the
cache is full, the youngest row gives its place back and waits at the head of the line; what it has is computed again
then, and since a draw depends on seed and position alone, its text is the same.
"""

from __future__ import annotations

import time
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.failures import as_fabric_error, out_of_memory
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.runner.input_batch import InputBatch, Prefill
from zfabric.backends.hf_transformers.scheduling.engine_core import EngineCore

#: A row joins only if the batch can go on for so many steps: less, and it would soon have to leave again.
_HEADROOM_COLUMNS: Final = 16


class PaddedCore(EngineCore):
    """Steps a left-padded batch; arguments as of `EngineCore`, cells of padding count as tokens of the cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefill: Prefill | None = None
        self._batch = InputBatch(self._model)

    def _sequences(self) -> list[Sequence]:
        prefill = self._prefill
        return self._batch.rows + ([] if prefill is None else prefill.rows)

    @property
    def running(self) -> int:
        return len({id(row.answer) for row in list(self._batch.rows)})

    @property
    def kv_tokens_free(self) -> int:
        return max(0, self._kv_limit - self.kv_tokens_held)

    @property
    def kv_tokens_held(self) -> int:
        prefill = self._prefill
        return self._batch.cells() + (0 if prefill is None else prefill.done)

    @property
    def _kv_limit(self) -> int:
        """Cells for the batch: the search at the head of the line has its own."""
        return self._kv_tokens_max - self._searches.cells

    @property
    def _crowded(self) -> bool:
        return self._batch.cells() > self._kv_limit

    @property
    def _full(self) -> bool:
        return len(self._batch.rows) >= self._batch_size_max

    def _compute(self) -> None:
        self._compute_prompts()
        self._make_room()
        if self._model.switch is not None:
            self._send_back(self._model.switch)
        if self._batch.rows:
            self._decode()

    def _drop_all(self) -> None:
        self._batch, self._prefill = InputBatch(self._model), None

    def _drop_rows(self) -> None:
        prefill = self._prefill
        if prefill is not None and not any(row.answer.wanted for row in prefill.rows):
            self._prefill = None
        self._batch.leave([index for index, row in enumerate(self._batch.rows) if row.answer.wanted])

    def _renew(self, *, keep: bool) -> None:
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            for group in prefill.groups:
                if group[0].answer.prompt_logprobs is not None:
                    group[0].answer.prompt_logprobs = []
            self._waiting.extendleft(reversed(prefill.groups))
        if not keep:
            self._waiting.extendleft([row] for row in reversed(self._batch.rows))
            self._batch = InputBatch(self._model)

    def probe(self) -> None:
        self._model.warm_up()

    # ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _compute_prompts(self) -> None:
        """Compute some tokens of the prompts in line; those that are whole join the batch."""
        running = bool(self._batch.rows)
        delayed, self._delayed = self._delayed, False
        budget = total = self._token_budget.budget(running=running)
        began = time.monotonic()
        while budget > 0:
            if self._prefill is None:
                self._prefill = self._next_prefill(budget, late=running and (delayed or budget < total))
            if self._prefill is None:
                break
            budget -= self._advance(self._prefill, budget)
        if running and budget < total:
            self._token_budget.took(total - budget, time.monotonic() - began)

    def _next_prefill(self, budget: int, *, late: bool) -> Prefill | None:
        """The prompts at the head of the line for which there is room: several if they fit the budget.

        Args:
            late: Running streams have waited for others in this turn: what cannot be cut to the budget waits for the next.
        """
        groups: list[list[Sequence]] = []
        skipped: list[list[Sequence]] = []
        width = rows = longest = 0
        while self._waiting:
            group = self._waiting[0]
            size, left = group[0].size, group[0].uncomputed
            count = min(len(group), self._room(rows, max(width, size)))
            alone = left > budget or group[0].answer.alone
            if late and left > budget and self._whole(group[0].answer):
                break
            unlike = bool(groups) and not self._model.pads and size != width
            crowded = (len(groups) + 1) * max(longest, left) > budget
            if not count and not groups and self._may_be_overtaken(group, len(skipped), full=self._full):
                skipped.append(self._waiting.popleft())
                continue
            if not count or (groups and (alone or crowded or unlike)):
                break
            self._waiting.popleft()
            if count < len(group):
                self._waiting.appendleft(group[count:])
            groups.append(group[:count])
            rows += count
            width, longest = max(width, size), max(longest, left)
            if alone or count < len(group):
                break
        self._waiting.extendleft(reversed(skipped))
        if not groups:
            return None
        for group in skipped:
            group[0].answer.overtaken += 1
        return Prefill(self._model, groups)

    def _whole(self, answer: Answer) -> bool:
        """Whether its prompt has one pass, however long it is."""
        return bool(answer.source) or answer.media is not None or not self._model.parts

    def _room(self, rows: int, width: int) -> int:
        """How many rows of such a width may join beside so many others. One may always, if it is the only one."""
        present = len(self._batch.rows) + rows
        columns = max(self._batch.columns, self._model.cells(width)) + _HEADROOM_COLUMNS
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
            if not self._batch.rollback():
                self.preemptions += len(rows)
                self._waiting.extendleft([row] for row in reversed(rows))
                self._batch = InputBatch(self._model)
            self._fail(rows[-1].answer, as_fabric_error(error))
            return
        self._token_budget.stepped(time.monotonic() - began)
        self._batch.commit([token for token, _ in drawn])
        self._batch.leave(self._enter(rows, drawn))
