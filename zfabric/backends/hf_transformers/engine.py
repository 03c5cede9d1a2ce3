"""The engine: one thread that steps a running batch, and lets requests join and leave at every step.

Theory of operation. Requests wait in order of arrival until the cache has room for all they may need, then their prompts
are computed a chunk at a time between two steps of the batch, so that a long prompt delays running streams by one chunk
and no more. All deltas of a step are handed over in one call. The event loop is never blocked: it only appends to a list
of commands, and the thread only calls back.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from zfabric.backends.hf_transformers.batch import Batch, Prefill
from zfabric.backends.hf_transformers.logprobs import prompt_logprobs, token_logprobs
from zfabric.backends.hf_transformers.prompts import fit, prompt_tokens
from zfabric.backends.hf_transformers.sampling import draw
from zfabric.backends.hf_transformers.sequence import Answer, Sequence
from zfabric.errors import BackendError, FabricError, OutOfMemoryError
from zfabric.wire.payloads import Delta, GenerateRequest, TokenLogprobs

Step = list[tuple[str, Delta]]


class Engine:
    """Steps a causal language model.

    Args:
        model, tokenizer: Of transformers; the model in evaluation mode.
        context_length: Tokens of prompt and answer.
        batch_size_max: Sequences in the batch.
        prefill_chunk_tokens: Prompt tokens between two steps.
        kv_tokens_max: Tokens that all admitted requests may come to hold.
        seed: For requests without one; None draws.
        on_step: Called on the engine's thread with all deltas of a step.
        on_failure: Called on the engine's thread for a request that failed alone.
        on_death: Called on the engine's thread when it cannot go on.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context_length: int,
        batch_size_max: int,
        prefill_chunk_tokens: int,
        kv_tokens_max: int,
        seed: int | None,
        on_step: Callable[[Step], None],
        on_failure: Callable[[str, FabricError], None],
        on_death: Callable[[FabricError], None],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._batch_size_max = batch_size_max
        self._chunk = prefill_chunk_tokens
        self._kv_tokens_max = kv_tokens_max
        self._seed = seed
        self._on_step, self._on_failure, self._on_death = on_step, on_failure, on_death
        self._changed = threading.Condition()
        self._arrived: list[GenerateRequest] = []
        self._aborted: set[str] = set()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = False
        self._waiting: deque[list[Sequence]] = deque()
        self._prefills: deque[Prefill] = deque()
        self._batch = Batch(model)
        self._reserved: dict[int, int] = {}
        self._step: Step = []
        self._end_tokens = _end_tokens(model, tokenizer)
        self.steps_taken = 0
        self._thread = threading.Thread(target=self._run, name="zfabric-engine", daemon=True)

    # ── from the event loop ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step, and wait for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: GenerateRequest) -> None:
        """Have a request answered through `on_step` or `on_failure`."""
        with self._changed:
            self._arrived.append(request)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        """Drop a request at the next step."""
        with self._changed:
            self._aborted.add(request_id)
            self._changed.notify()

    def run_job(self, job: Callable[[], Any]) -> Future[Any]:
        """Run something else with the model, between two steps."""
        future: Future[Any] = Future()
        with self._changed:
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    @property
    def waiting(self) -> int:
        """Requests not yet in the batch."""
        return len(self._arrived) + len(self._waiting) + len(self._prefills)

    @property
    def kv_tokens_free(self) -> int:
        """Tokens of cache that no admitted request may come to need."""
        return max(0, self._kv_tokens_max - sum(self._reserved.copy().values()))

    # ── the thread ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._next_work():
                    self._turn()
        except BaseException as error:  # noqa: BLE001 — a dead engine has to be known, whatever killed it
            self._on_death(BackendError(f"the engine's thread died: {type(error).__name__}: {error}"))

    def _next_work(self) -> bool:
        """Wait for something to do and take the commands in. False when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._arrived or self._aborted or self._jobs or self._busy):
                self._changed.wait()
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = self._aborted, set()
        for request in arrived:
            if request.request_id not in aborted:
                self._accept(request)
        if aborted:
            self._drop(aborted)
        return not self._stopping

    @property
    def _busy(self) -> bool:
        return bool(self._batch.rows or self._prefills or self._waiting)

    def _turn(self) -> None:
        """One job, some prompt tokens, one step of the batch."""
        if self._jobs:
            job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # noqa: BLE001 — handed to whoever waits for the job
                    future.set_exception(error)
        self._admit()
        budget = self._chunk
        while self._prefills and budget > 0:
            budget -= self._prefill(min(budget, self._prefills[0].left))
        if self._batch.rows:
            self._decode()
        if self._step:
            step, self._step = self._step, []
            self.steps_taken += 1
            self._on_step(step)

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _accept(self, request: GenerateRequest) -> None:
        """Tokenize a request and put it in line."""
        try:
            sequences = self._sequences(request)
        except FabricError as error:
            self._on_failure(request.request_id, error)
            return
        except Exception as error:  # noqa: BLE001 — a tokenizer's complaint is about this request
            self._on_failure(request.request_id, BackendError(f"{type(error).__name__}: {error}"))
            return
        first = sequences[0]
        echo = first.echo(lambda tokens: str(self._tokenizer.decode(tokens, skip_special_tokens=True)))
        if echo is not None:
            for sequence in sequences:
                self._step.append((request.request_id, Delta(text=echo.text, index=sequence.index)))
        if request.resume_token_ids:
            ended = first.resume(list(request.resume_token_ids))
            if ended is not None:
                self._step.append((request.request_id, ended))
                return
        self._waiting.append(sequences)

    def _sequences(self, request: GenerateRequest) -> list[Sequence]:
        sampling = request.sampling
        tokens = prompt_tokens(
            self._tokenizer, request.prompt, request.messages, request.prompt_token_ids, request.tools
        )
        tokens = fit(tokens, self._context_length, truncate=sampling.truncate_prompt)
        room = self._context_length - len(tokens)
        if len(tokens) + 1 > self._kv_tokens_max:
            raise OutOfMemoryError(
                f"prompt of {len(tokens)} tokens is larger than the cache of {self._kv_tokens_max}",
                prompt_tokens=len(tokens),
                kv_tokens_max=self._kv_tokens_max,
            )
        room = min(room, self._kv_tokens_max - len(tokens))
        answer = Answer(request, tokens)
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._end_tokens)
        seed = sampling.seed if sampling.seed is not None else self._seed
        base = secrets.randbits(63) if seed is None else seed
        banned = tuple(
            tuple(self._tokenizer(form, add_special_tokens=False)["input_ids"])
            for word in sampling.bad_words
            for form in (word, f" {word}")
        )
        return [
            Sequence(
                answer,
                index=index,
                limit=min(sampling.max_new_tokens or room, room),
                seed=base + index * 0x9E3779B9,
                end_tokens=ends,
                bad_words=tuple(words for words in banned if words),
                tokenizer=self._tokenizer,
            )
            for index in range(sampling.n)
        ]

    def _admit(self) -> None:
        """Start prompts while there is room for all that they may come to hold."""
        while self._waiting:
            sequences = self._waiting[0]
            first = sequences[0]
            need = len(sequences) * (len(first.answer.prompt) + first.limit)
            running = len(self._batch.rows) + sum(len(prefill.rows) for prefill in self._prefills)
            full = running + len(sequences) > self._batch_size_max or need > self.kv_tokens_free
            if full and running:
                return
            self._waiting.popleft()
            self._reserved[id(first.answer)] = need
            self._prefills.append(Prefill(self._model, sequences, [*first.answer.prompt, *first.output]))

    def _prefill(self, count: int) -> int:
        """Compute some tokens of the first prompt in line; when it is whole, it joins the batch. Returns how many."""
        prefill = self._prefills[0]
        sequences = prefill.rows
        wanted = sequences[0].answer.request.sampling.prompt_logprobs
        begin = prefill.done
        try:
            logits = prefill.advance(count, all_logits=wanted is not None)
        except torch.OutOfMemoryError as error:
            self._prefills.popleft()
            self._out_of_memory(sequences, error)
            return count
        if wanted is not None:
            self._give_prompt_logprobs(prefill, logits, begin, wanted)
        if prefill.left:
            return count
        self._prefills.popleft()
        scores = logits[-1:].repeat(len(sequences), 1) if len(sequences) > 1 else logits[-1:]
        drawn = self._take(sequences, scores)
        alive = [index for index, sequence in enumerate(sequences) if drawn[index] is not None]
        if alive:
            tokens = [token for token in drawn if token is not None]
            self._batch.join([sequences[i] for i in alive], prefill.cache, len(prefill.tokens), tokens)
        return count

    def _give_prompt_logprobs(self, prefill: Prefill, logits: torch.Tensor, begin: int, count: int) -> None:
        answer = prefill.rows[0].answer
        entries = prompt_logprobs(logits, prefill.tokens, begin, count, self._tokenizer)
        entries = entries[: max(0, len(answer.prompt) - begin)]
        if entries and not answer.request.resume_token_ids:
            self._step.append((answer.request.request_id, Delta(prompt_logprobs=entries)))

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decode(self) -> None:
        """One token for every row."""
        rows = self._batch.rows
        try:
            logits = self._batch.forward()
        except torch.OutOfMemoryError as error:
            self._batch.repair()
            youngest = rows[-1].answer
            self._out_of_memory([row for row in rows if row.answer is youngest], error)
            self._batch.leave([i for i, row in enumerate(rows) if row.answer is not youngest])
            return
        drawn = self._take(rows, logits)
        self._batch.feed([token if token is not None else 0 for token in drawn])
        keep = [index for index, token in enumerate(drawn) if token is not None]
        self._batch.leave(keep)

    def _take(self, rows: list[Sequence], logits: torch.Tensor) -> list[int | None]:
        """Draw for these rows and enter what was drawn. None where a row has ended."""
        counts = [row.answer.request.sampling.logprobs for row in rows]
        raw = logits.clone() if any(count is not None for count in counts) else None
        tokens: list[int] = draw(logits, [row.row for row in rows]).tolist()
        result: list[int | None] = []
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            count = counts[index]
            logprobs: TokenLogprobs | None = None
            if raw is not None and count is not None:
                logprobs = token_logprobs(raw[index], token, count, self._tokenizer)
            delta = row.take(token, logprobs)
            self._step.append((row.answer.request.request_id, delta))
            result.append(token if delta.finish_reason is None else None)
            if delta.usage is not None:
                self._reserved.pop(id(row.answer), None)
        return result

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _drop(self, request_ids: set[str]) -> None:
        """Forget aborted requests wherever they are."""

        def wanted(sequence: Sequence) -> bool:
            if sequence.answer.request.request_id not in request_ids:
                return True
            self._reserved.pop(id(sequence.answer), None)
            return False

        self._waiting = deque(group for group in self._waiting if wanted(group[0]))
        self._prefills = deque(prefill for prefill in self._prefills if wanted(prefill.rows[0]))
        self._batch.leave([index for index, row in enumerate(self._batch.rows) if wanted(row)])

    def _out_of_memory(self, sequences: list[Sequence], error: BaseException) -> None:
        """The request that asked for too much pays; the others go on."""
        answer = sequences[0].answer
        self._reserved.pop(id(answer), None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first_line = str(error).partition("\n")[0]
        self._on_failure(answer.request.request_id, OutOfMemoryError(f"out of device memory: {first_line}"))


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by the generation settings and the tokenizer."""
    found: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for value in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(value)
    return frozenset(found)
