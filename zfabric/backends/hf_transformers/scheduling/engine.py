"""The engine: one thread that steps requests, and lets them join and leave at every step.

Theory of operation. Requests are tokenized beside the engine's thread, which takes them in between two turns of its
`EngineCore`. All deltas of a turn are handed over in one call. The event loop is never blocked: it only appends to lists, and
the thread only calls back. A turn that breaks costs what was being computed in it: the thread drops that, tries the model,
and goes on with what waits; if the model itself is broken, or breaks again and again, the engine is dead.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import torch

from zfabric.backends.front.cached import CacheTranslator
from zfabric.backends.hf_transformers.failures import give_memory_back
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.request.token_budget import TokenBudget
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner
from zfabric.backends.hf_transformers.scheduling.ahead_core import AheadCore
from zfabric.backends.hf_transformers.scheduling.engine_core import EngineCore, Step
from zfabric.backends.hf_transformers.scheduling.input_processor import InputProcessor
from zfabric.backends.hf_transformers.scheduling.jobs import Jobs
from zfabric.backends.hf_transformers.scheduling.padded_core import PaddedCore
from zfabric.backends.hf_transformers.scheduling.paged_core import PagedCore
from zfabric.backends.hf_transformers.scheduling.weight_switch import SwitchMode, WeightSwitch
from zfabric.backends.hf_transformers.speculative.speculation import Speculation
from zfabric.errors import BackendError, FabricError, RequestError, WorkerLostError
from zfabric.wire.payloads import GenerateRequest

#: Something that breaks more often than so many times in so long is no accident, and a new process is the better cure.
_RESTARTS_MAX: Final = 3
_RESTARTS_WINDOW_S: Final = 60.0

#: Where nothing runs, the first turn waits so long at most, in seconds, for requests that are being prepared: who comes together
#: is computed together, instead of the first alone and the others by parts beside it. To prepare one takes less than a
#: millisecond.
_GATHER_S: Final = 0.01
#: And it waits for the next one by such a share of the time that the latest turn took: 32 requests that a program sends one
#: after the other, to SmolLM2, came in one turn instead of twelve, and one that is alone has its first token 2 % later.
_NEXT_SHARE: Final = 0.04

#: Devices that compute a step while the host does something else.
_AHEAD: Final = frozenset({"cuda"})


class Engine:
    """Runs a causal language model.

    Args:
        model: The forward pass.
        input_processor: Prepares requests.
        tokenizer: For the texts of log-probabilities.
        batch_size_max: Sequences in the batch.
        paged: The same over pages; None where rows are padded.
        speculation: Guesses what rows over pages go on with; None for nothing.
        kv_tokens_max: Tokens of the cache; padding counts.
        search_tokens_max: Of a beam search's own; None for as many.
        token_budget: How much of a prompt is computed between two steps.
        on_step: Called on the engine's thread with all deltas of a step.
        on_failure: Called on any thread for a request that failed alone, or was lost in a turn that broke.
        on_restart: Called on the engine's thread after such a turn.
        on_death: Called on the engine's thread when it cannot go on.
    """

    def __init__(
        self,
        model: ModelRunner,
        input_processor: InputProcessor,
        tokenizer: Any,
        *,
        paged: PagedRunner | None,
        batch_size_max: int,
        kv_tokens_max: int,
        search_tokens_max: int | None = None,
        token_budget: TokenBudget,
        on_step: Callable[[Step], None],
        on_failure: Callable[[Answer, FabricError], None],
        on_restart: Callable[[FabricError], None],
        on_death: Callable[[FabricError], None],
        speculation: Speculation | None = None,
    ) -> None:
        self._input_processor = input_processor
        self._on_step, self._on_failure = on_step, on_failure
        self._on_restart, self._on_death = on_restart, on_death
        make: Callable[..., EngineCore] = partial(PaddedCore, model)
        if paged is not None:
            kind = AheadCore if paged.model.device.type in _AHEAD else PagedCore
            make = partial(kind, paged, speculation=speculation)
        self._core: EngineCore = make(
            tokenizer, batch_size_max=batch_size_max, kv_tokens_max=kv_tokens_max,
            search_tokens_max=search_tokens_max, token_budget=token_budget, on_end=self._forget, on_failure=on_failure,
        )  # fmt: skip
        self._changed = threading.Condition()
        self._answers: dict[str, Answer] = {}
        self._arrived: list[list[Sequence]] = []
        #: Requests that are still to be prepared.
        self._unprepared = 0
        #: Requests that have come so far.
        self._submitted = 0
        self._jobs = Jobs()
        self._switch: WeightSwitch | None = None
        self._stopping = False
        self._sweep = False
        self.steps_taken = 0
        self._step_ns = 0
        self._kv_tokens_max = kv_tokens_max
        #: When turns broke, by the monotonic clock.
        self._broke: deque[float] = deque(maxlen=_RESTARTS_MAX + 1)
        self.restarts = 0
        #: When the present turn began, by the monotonic clock; None while there is nothing to do.
        self._turn_began: float | None = None
        self._hung = False
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="zfabric-input")
        input_processor.run_by(self._run_encoder)
        self._thread = threading.Thread(target=self._run, name="zfabric-engine", daemon=True)

    # ── from the event loop ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def tell_cache(self, model: str, tell: Callable[[CacheTranslator], None]) -> None:
        """As of `EngineCore`, before the first request."""
        self._core.tell_cache(model, tell)

    def stop(self) -> None:
        """End the thread after its present step, and wait for it unless it was given up."""
        self._preparing.shutdown(wait=not self._hung, cancel_futures=True)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive() and not self._hung:
            self._thread.join()

    def hangs(self, limit_s: float) -> bool:
        """Whether a turn takes longer than this; if so the thread is given up, and `stop` does not wait for it."""
        began = self._turn_began
        self._hung = self._hung or (began is not None and time.monotonic() - began > limit_s)
        return self._hung

    def submit(self, request: GenerateRequest) -> None:
        """Have a request answered through `on_step` or `on_failure`."""
        self.abort(request.request_id)
        answer = self._answers[request.request_id] = Answer(request)
        with self._changed:
            self._unprepared += 1
            self._submitted += 1
        self._preparing.submit(self._prepare, answer)

    def abort(self, request_id: str) -> None:
        """Drop a request at the next step."""
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            answer.cancelled = True
            with self._changed:
                self._sweep = True
                self._changed.notify()

    def run_job(self, job: Callable[[], Any]) -> Future[Any]:
        """Run something else with the model, between two steps."""
        with self._changed:
            future = self._jobs.put(job)
            self._changed.notify()
            if self._stopping:
                self._jobs.end(BackendError("the engine has ended"))
        return future

    def _run_encoder(self, job: Callable[[], Any]) -> Future[Any]:
        """Run what is a pass of an encoder, which running streams wait for: in its turn no prompt is computed."""

        def run() -> Any:
            self._core.delay_prompts()
            return job()

        return self.run_job(run)

    def switch_weights(self, change: Callable[[], None], mode: SwitchMode, version: str) -> Future[int]:
        """Have weights changed between two steps; one at a time. See `WeightSwitch`."""
        switch = WeightSwitch(change, mode, version)
        with self._changed:
            if self._stopping:
                switch.end(BackendError("the engine has ended"))
            else:
                self._switch = switch
                self._changed.notify()
        return switch.future

    @property
    def weight_version(self) -> str:
        """What the weights are called; empty if nobody has said it."""
        return self._core.weight_version

    @weight_version.setter
    def weight_version(self, version: str) -> None:
        self._core.weight_version = version

    @property
    def waiting(self) -> int:
        """Requests of which nothing is in the batch."""
        return max(0, len(self._answers) - self._core.running)

    @property
    def running(self) -> bool:
        """Whether anything is in the batch."""
        return self._core.running > 0

    def users(self, adapter: Adapter) -> int:
        """Requests that have this adapter."""
        return sum(answer.adapter is adapter for answer in list(self._answers.values()))

    @property
    def gauges(self) -> dict[str, float]:
        """Figures for operators, by the names that a vLLM worker's have too; `step_ms` is what the latest turn took."""
        free, total = self.kv_tokens_free, max(1, self._kv_tokens_max)
        return {
            "running": self._core.running,
            "waiting": self.waiting,
            "kv_cache_use": round(1 - free / total, 4),
            "kv_tokens_free": free,
            "preemptions": self._core.preemptions,
            "steps": self.steps_taken,
            "step_ms": round(self._step_ns / 1e6, 3),
            "engine_restarts": self.restarts,
            **self._core.gauges,
        }

    @property
    def kv_tokens_free(self) -> int:
        """Cells of the cache that are not in use."""
        return self._core.kv_tokens_free

    @property
    def kv_tokens_held(self) -> int:
        """Cells of the cache that have memory."""
        return self._core.kv_tokens_held

    # ── the input processor's thread ──────────────────────────────────────────────────────────────────────────────────

    def _prepare(self, answer: Answer) -> None:
        sequences: list[Sequence] | None = None
        try:
            if not answer.cancelled:
                sequences = self._sequences(answer)
        finally:
            with self._changed:
                self._unprepared -= 1
                if sequences is not None:
                    self._arrived.append(sequences)
                self._changed.notify()

    def _sequences(self, answer: Answer) -> list[Sequence] | None:
        """What there is to compute of a request; None if it has failed."""
        try:
            return self._input_processor.sequences(answer)
        except FabricError as error:
            self._fail(answer, error)
        except Exception as error:  # noqa: BLE001 — a tokenizer's complaint is about this request
            self._fail(answer, RequestError(f"the request cannot be tokenized: {type(error).__name__}: {error}"))
        return None

    # ── the engine's thread ─────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        end: FabricError = BackendError("the engine has ended")
        try:
            with torch.inference_mode():
                while self._next_work():
                    self._turn_began = time.monotonic()
                    self._turn()
                    self._turn_began = None
        except BaseException as error:  # noqa: BLE001 — a dead engine has to be known, whatever killed it
            end = BackendError(f"the engine's thread died: {type(error).__name__}: {error}")
            self._on_death(end)
        with self._changed:
            self._stopping = True
        self._jobs.end(end)
        if self._switch is not None:
            self._switch.end(end)

    def _next_work(self) -> bool:
        """Wait for something to do and take it in. False when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._arrived or self._sweep or self._jobs or self._switch or self._core.busy):
                self._changed.wait()
            if self._arrived and not self._core.busy:
                self._gather()
            arrived, self._arrived = self._arrived, []
            sweep, self._sweep = self._sweep, False
        for sequences in arrived:
            self._core.accept(sequences)
        if sweep:
            self._core.drop_ended()
        return not self._stopping

    def _gather(self) -> None:
        """Wait a little for requests that come together with those that have arrived; the lock is held."""
        until = time.monotonic() + _GATHER_S
        for_next = min(_NEXT_SHARE * self._step_ns / 1e9, _GATHER_S)

        def wait_for(found: Callable[[], bool], seconds: float) -> bool:
            left = min(seconds, until - time.monotonic())
            return self._changed.wait_for(lambda: self._wanted or found(), left) and not self._wanted

        while wait_for(lambda: not self._unprepared, _GATHER_S):
            if not wait_for(partial(self._more_than, self._submitted), for_next):
                return

    def _more_than(self, count: int) -> bool:
        """Whether more requests than so many have come."""
        return self._submitted > count

    @property
    def _wanted(self) -> bool:
        """Whether something else is to be done at once."""
        return self._stopping or bool(self._jobs)

    def _turn(self) -> None:
        """One job, other weights if it is time for them, and a turn of the core."""
        if self._jobs:
            self._jobs.run_one()
        switch = self._switch
        if switch is not None and switch.made(self._core):
            with self._changed:
                # Whoever asked for it may have asked for the next one by now.
                self._switch = None if self._switch is switch else self._switch
        broken: Exception | None = None
        started_ns = time.monotonic_ns()
        try:
            self._core.turn()
        except Exception as error:  # noqa: BLE001 — judged by whether the model still works
            broken = error
        self.steps_taken += 1
        self._step_ns = time.monotonic_ns() - started_ns
        step = self._core.take()
        if step:
            self._on_step(step)
        if broken is not None:
            self._start_anew(broken)

    def _start_anew(self, broken: Exception) -> None:
        """A turn broke: its requests go elsewhere, and the thread goes on if the model does.

        Raises:
            Exception: It happens again and again, or the model is broken.
        """
        self._broke.append(time.monotonic())
        if len(self._broke) > _RESTARTS_MAX and self._broke[-1] - self._broke[0] < _RESTARTS_WINDOW_S:
            raise broken
        lost = WorkerLostError(f"the engine broke and begins anew: {type(broken).__name__}: {broken}")
        # What the failed frames hold is memory of the device.
        broken.__traceback__ = None
        self._core.reset(lost)
        give_memory_back()
        self._core.probe()
        self.restarts += 1
        self._on_restart(lost)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, answer: Answer, error: FabricError) -> None:
        """A request that has not reached the core cannot be served."""
        answer.over = True
        self._forget(answer)
        self._on_failure(answer, error)

    def _forget(self, answer: Answer) -> None:
        with self._changed:
            if self._answers.get(answer.request.request_id) is answer:
                del self._answers[answer.request.request_id]
