"""What both engine cores have: the line of those that wait, what requests are given, and what becomes of those that fail.

A core is stepped by the engine's thread. What a turn of it computes is up to its kind of cache: rows over pages
(`paged_core`), or rows that are padded (`padded_core`). Beam searches take one step between two turns of either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from zfabric.backends.front.cached import CacheTranslator
from zfabric.backends.hf_transformers.failures import as_fabric_error, nothing_left
from zfabric.backends.hf_transformers.request.sequence import Answer, Sequence
from zfabric.backends.hf_transformers.request.token_budget import TokenBudget
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.sampling.logits_processors import NOTHING
from zfabric.backends.hf_transformers.sampling.pending_draws import Drawn
from zfabric.backends.hf_transformers.sampling.sampler import Sampler
from zfabric.backends.hf_transformers.scheduling.beam_search import BeamSearchQueue
from zfabric.backends.hf_transformers.scheduling.weight_switch import SwitchMode
from zfabric.errors import ConfigurationError, FabricError, RequestError
from zfabric.wire.payloads import Delta

Step = list[tuple[Answer, Delta]]

#: How often those behind it may go before a prompt that there is no room for, and how many of such are passed by at a time.
_OVERTAKEN_MAX: Final = 64
_LOOKED_AT_MAX: Final = 16


class EngineCore(ABC):
    """Steps requests. It knows no threads: one at a time may call it, but for the properties that say so.

    Args:
        model: The forward pass.
        tokenizer: For the texts of log-probabilities.
        batch_size_max: Sequences in the batch.
        kv_tokens_max: Tokens of the cache.
        search_tokens_max: Of a beam search's own; None for as many.
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
        search_tokens_max: int | None = None,
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
        self._searches = BeamSearchQueue(model, kv_tokens_max if search_tokens_max is None else search_tokens_max)
        self._step: Step = []
        self._stale = False
        self._delayed = False
        #: What has not begun and may not, until `release`; None while all may.
        self._held: list[list[Sequence]] | None = None
        #: What the weights are called; told with answers unless it is empty.
        self.weight_version = ""
        #: Rows that had to leave the batch for want of room, and are computed again.
        self.preemptions = 0

    # ── of each kind ────────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def _sequences(self) -> list[Sequence]:
        """All that are being computed. From any thread."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Requests of which something is in the batch. From any thread."""

    @property
    @abstractmethod
    def kv_tokens_free(self) -> int:
        """Tokens that the cache has room for beside those in use. From any thread."""

    @property
    @abstractmethod
    def kv_tokens_held(self) -> int:
        """Tokens that the cache has memory for, in use or not. From any thread."""

    @abstractmethod
    def _compute(self) -> None:
        """Some prompt tokens, and one step of the batch."""

    @abstractmethod
    def _drop_all(self) -> None:
        """Give up what is being computed, and what may be broken with it."""

    @abstractmethod
    def _drop_rows(self) -> None:
        """Give up rows that nobody waits for."""

    @abstractmethod
    def _renew(self, *, keep: bool) -> None:
        """The weights are others: what is cached serves nobody who begins now, and what is being computed of prompts waits again.

        Args:
            keep: Rows that are stepped go on with what is cached of them; else they wait again as well.
        """

    @abstractmethod
    def probe(self) -> None:
        """Try the model. Raises: Exception: It is broken."""

    def tell_cache(self, model: str, tell: Callable[[CacheTranslator], None]) -> None:
        """Have what becomes cached of prompts, and what goes, told at the end of each turn, from now on.

        Args:
            model: Name of the model.
            tell: Called on the engine's thread when something changed.

        Raises:
            ConfigurationError: This kind shares no prompts.
        """
        raise ConfigurationError(
            "tell_cache is given, but rows that are padded share no prompts; it needs a cache of pages"
        )

    @property
    def _crowded(self) -> bool:
        """Whether the batch has yet to make room for a beam search."""
        return False

    @property
    def gauges(self) -> dict[str, float]:
        """Figures of this kind alone."""
        return {}

    # ── a turn ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._waiting or self._searches or self._sequences())

    def turn(self) -> None:
        """Some prompt tokens, one step of the batch, one of a search. What it makes is there for `take`.

        Raises:
            Exception: What broke the batch; `reset` is all that can be done then.
        """
        self._compute()
        if self._searches:
            self._search()
        if self._stale:
            self.drop_ended()

    def delay_prompts(self) -> None:
        """Running streams wait for something else in this turn: what cannot be cut waits for the next, if any run."""
        self._delayed = True

    def take(self) -> Step:
        """All deltas made since the last call."""
        step, self._step = self._step, []
        return step

    def reset(self, error: FabricError) -> None:
        """Begin anew after a turn that broke: what was being computed fails with this, the others keep their place."""
        answers = _answers(self._sequences())
        self._drop_all()
        for answer in answers:
            if answer.wanted:
                self._fail(answer, error)
        self.drop_ended()

    # ── other weights ───────────────────────────────────────────────────────────────────────────────────────────────

    def hold(self) -> None:
        """Begin no request that has not begun, until `release`. Of those that have, each choice may."""
        if self._held is not None:
            return
        begun = {id(one.answer) for one in self._sequences()}
        waiting, self._waiting, self._held = self._waiting, deque(), []
        for group in waiting:
            goes_on = group[0].output or id(group[0].answer) in begun
            (self._waiting if goes_on else self._held).append(group)

    def release(self) -> None:
        """Requests may begin again."""
        held, self._held = self._held or [], None
        for group in held:
            self.accept(group)

    def renew(self, mode: SwitchMode, version: str) -> int:
        """The weights have become others. Returns how many requests ran.

        Args:
            mode: What becomes of these.
            version: What the weights are called now.
        """
        running = _answers(self._sequences())
        if mode == "abort":
            self._abort(running)
        self.weight_version = version
        self._renew(keep=mode == "keep")
        self._searches.restart(drawn=mode != "keep")
        if self._stale:
            self.drop_ended()
        return len(running)

    def _abort(self, running: list[Answer]) -> None:
        """End requests that run, and those that did and wait to go on."""
        begun = {id(answer) for answer in running}
        waiting = [one for group in self._waiting for one in group if one.output or id(one.answer) in begun]
        for one in [*self._sequences(), *waiting]:
            if one.answer.wanted:
                self._give(one.answer, one.abort())
        for answer, deltas in self._searches.abort():
            for delta in deltas:
                self._give(answer, delta)
        self._stale = True

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def accept(self, sequences: list[Sequence]) -> None:
        """Put a prepared request in line, unless it has ended already."""
        answer = sequences[0].answer
        if answer.cancelled:
            return
        if self._held is not None:
            self._held.append(sequences)
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

    def _may_be_overtaken(self, group: list[Sequence], skipped: int, *, full: bool) -> bool:
        """Whether others may go before one that there is no room for: not too often, and not if it had a place already.

        Args:
            full: No place is left for anybody.
        """
        begun = bool(group[0].output)
        return not (full or begun or skipped >= _LOOKED_AT_MAX or group[0].answer.overtaken >= _OVERTAKEN_MAX)

    def _search(self) -> None:
        """Take a beam search a step further."""
        budget = self._token_budget.budget(running=self.running > 0)
        answer, deltas, error = self._searches.advance(budget, crowded=self._crowded)
        if error is not None:
            self._fail(answer, as_fabric_error(error))
        for delta in deltas:
            if self.weight_version:
                delta.extra = {"weight_version": self.weight_version}
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
            if self.weight_version:
                row.drawn_by(self.weight_version, delta)
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
        if self._held is not None:
            self._held = [group for group in self._held if group[0].answer.wanted]
        self._drop_rows()
        self._searches.drop_ended()


def _answers(sequences: Iterable[Sequence]) -> list[Answer]:
    """Whose these are, each once."""
    return list({id(one.answer): one.answer for one in sequences}.values())
