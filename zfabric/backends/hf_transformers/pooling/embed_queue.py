"""Requests for vectors, classes and scores that share forward passes, a part of one between two steps of the running batch.

Texts of all waiting requests take turns, so a short request does not wait for the end of a long one. While streams run,
a part is as large as they may wait for, as with prompts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from zfabric.backends.hf_transformers.failures import as_fabric_error, out_of_memory
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.pooling.embedding import Embedder, EmbedPass, Pieces
from zfabric.backends.hf_transformers.request.token_budget import TokenBudget


class _Work:
    """A request on its way."""

    __slots__ = ("alone", "future", "left", "pieces", "todo", "vectors")

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.future: Future[Any] = Future()
        self.left = len(pieces.pieces)
        self.vectors: list[Any] = [None] * self.left
        #: Longest last: texts of like length share a pass, so little is padded.
        self.todo = deque(sorted(range(self.left), key=lambda index: len(pieces.pieces[index].tokens)))
        #: A pass that it was in has failed: its texts are tried one by one.
        self.alone = False


class EmbedQueue:
    """Gathers texts into passes.

    Args:
        embedder: Makes vectors.
        run_job: Runs a function on the engine's thread, between two steps.
        batch_tokens_max: Tokens of one pass, padding included; one text may have more.
        token_budget: How many of them are computed at a time while streams run.
        running: Whether any do. Called on the engine's thread.
    """

    def __init__(
        self,
        embedder: Embedder,
        run_job: Callable[[Callable[[], Any]], Any],
        batch_tokens_max: int,
        *,
        token_budget: TokenBudget,
        running: Callable[[], bool],
    ) -> None:
        self._embedder = embedder
        self._run_job = run_job
        self._token_budget = token_budget
        self._running = running
        self._pass: EmbedPass | None = None
        self._chosen: list[tuple[_Work, int]] = []
        self._batch_tokens_max = batch_tokens_max
        self._lock = threading.Lock()
        self._works: deque[_Work] = deque()

    def submit(self, pieces: Pieces) -> Future[Any]:
        """Have them made, and the request's result of them. A cancelled future takes no further part."""
        work = _Work(pieces)
        with self._lock:
            self._works.append(work)
        self._schedule()
        return work.future

    def restart(self) -> None:
        """Compute the pass under way from its beginning. On the engine's thread."""
        if self._pass is None:
            return
        self._pass = None
        self._put_back()

    def users(self, adapter: Adapter) -> int:
        """Requests that have this adapter. On any thread."""
        with self._lock:
            works = {id(work): work for work in (*self._works, *(work for work, _ in self._chosen))}
        return sum(work.pieces.adapter is adapter and not work.future.done() for work in works.values())

    def _schedule(self) -> None:
        """Have one pass made. If the engine has ended, nobody will: say so."""
        self._run_job(self._step).add_done_callback(self._note)

    def _note(self, job: Future[None]) -> None:
        error = job.exception()
        if error is None:
            return
        with self._lock:
            works, self._works = self._works, deque()
        for work in [*works, *(work for work, _ in self._chosen)]:
            if not work.future.done():
                work.future.set_exception(error)

    def _step(self) -> None:
        """A part of a pass."""
        running = self._running()
        budget = self._token_budget.budget(running=running)
        if self._pass is not None and all(work.future.done() for work, _ in self._chosen):
            self._pass = None
        try:
            if self._pass is None and not self._begin(budget if running else self._batch_tokens_max):
                return
            vectors = self._advance(budget, running=running)
        except Exception as error:  # noqa: BLE001 — it is an answer to whose texts these are
            self._pass = None
            self._failed(self._chosen, error)
        else:
            if vectors is not None:
                self._pass = None
                for (work, index), vector in zip(self._chosen, vectors, strict=True):
                    self._enter(work, index, vector)
        if self._works or self._pass is not None:
            self._schedule()

    def _begin(self, tokens_max: int) -> bool:
        """Start the next pass. False if nobody waits for one."""
        self._chosen = self._choose(min(tokens_max, self._batch_tokens_max))
        if not self._chosen:
            return False
        pieces = [work.pieces.pieces[index] for work, index in self._chosen]
        adapters = [work.pieces.adapter for work, _ in self._chosen]
        self._pass = self._embedder.begin(pieces, self._chosen[0][0].pieces.pooling, adapters)
        return True

    def _advance(self, budget: int, *, running: bool) -> Any:
        assert self._pass is not None
        began = time.monotonic()
        with torch.inference_mode():
            vectors = self._pass.advance(budget)
        if running:
            self._token_budget.took(self._pass.spent, time.monotonic() - began)
        return vectors

    def _choose(self, tokens_max: int) -> list[tuple[_Work, int]]:
        """Texts of one pass: in turn from each request that pools alike."""
        chosen: list[tuple[_Work, int]] = []
        width = 0
        with self._lock:
            self._works = deque(work for work in self._works if work.todo and not work.future.done())
            others: deque[_Work] = deque()
            while self._works:
                work = self._works.popleft()
                longest = max(width, len(work.pieces.pieces[work.todo[0]].tokens))
                if chosen and (
                    longest * (len(chosen) + 1) > tokens_max
                    or work.pieces.pooling != chosen[0][0].pieces.pooling
                    or work.alone
                    or chosen[0][0].alone
                ):
                    others.append(work)
                    continue
                width = longest
                chosen.append((work, work.todo.popleft()))
                if work.todo:
                    self._works.append(work)
            self._works = others
        return chosen

    def _enter(self, work: _Work, index: int, vector: Any) -> None:
        work.vectors[index] = vector
        work.left -= 1
        if not work.left and work.future.set_running_or_notify_cancel():
            work.future.set_result(work.pieces.result(work.vectors))

    def _failed(self, chosen: list[tuple[_Work, int]], error: Exception) -> None:
        """For want of memory, smaller passes are tried, else single texts; one that fails alone costs its request."""
        memory = out_of_memory(error)
        if len(chosen) > 1:
            if memory:
                self._batch_tokens_max = max(1, self._batch_tokens_max // 2)
            for work, _ in chosen:
                work.alone = not memory
            self._put_back()
            return
        work = chosen[0][0]
        if work.future.set_running_or_notify_cancel():
            work.future.set_exception(as_fabric_error(error))

    def _put_back(self) -> None:
        """Texts of the pass under way wait again."""
        with self._lock:
            for work, index in self._chosen:
                work.todo.appendleft(index)
                if work not in self._works:
                    self._works.append(work)
