"""One stream at its worker: what was made, what was sent, what the reader allows.

Rule 1: every delta is kept until the reader is known to have it, so that a stream can go on after a controller's death.
Rule 2: a unit is sent once per controller, in order, and only below the window; what is held back is merged, so that the
        next credit brings one larger chunk.
Rule 3: the terminal is exempt from credit, and brings along whatever is left.
"""

from __future__ import annotations

from zfabric.wire.messages import Operation
from zfabric.wire.payloads import Chunk, ChunkExtra, Delta, Outcome, Usage

#: Rough size of one kept delta, for the bound on finished answers: objects, not wire bytes.
_DELTA_BYTES = 200


class Backlog:
    """A request's answer as its worker has it."""

    __slots__ = (
        "attempt", "client", "code", "completion_tokens", "deltas", "end", "finished_ns", "first", "instance", "model",
        "next", "open_choices", "operation", "outcome", "request", "request_id", "resumed", "sent", "window",
    )  # fmt: skip

    def __init__(
        self,
        *,
        request_id: str,
        client: int,
        instance: int,
        request: int,
        attempt: int,
        operation: Operation,
        model: str,
        window: int,
        resume_from: int,
        choices: int,
    ) -> None:
        self.request_id = request_id
        self.client: int | None = client
        self.instance = instance
        self.request = request
        self.attempt = attempt
        self.operation: Operation = operation
        self.model = model
        self.window = window
        self.resumed = resume_from
        self.open_choices = choices
        #: Deltas kept; `first` is the offset of deltas[0], `next` of deltas[sent], `end` after the last.
        self.deltas: list[Delta] = []
        self.first = self.next = self.end = resume_from
        self.sent = 0
        self.completion_tokens = 0
        self.code: int | None = None
        self.outcome: Outcome | None = None
        self.finished_ns = 0

    @property
    def finished(self) -> bool:
        """Whether its terminal is known."""
        return self.outcome is not None

    @property
    def held_units(self) -> int:
        """Units made and not sent."""
        return self.end - self.next

    @property
    def bytes_kept(self) -> int:
        """About what keeping it costs."""
        result = len(memoryview(self.outcome.result)) if self.outcome is not None else 0
        return _DELTA_BYTES * (len(self.deltas) + 4) + result

    def add(self, delta: Delta) -> None:
        """Keep a new delta."""
        self.deltas.append(delta)
        tokens = len(delta.token_ids)
        self.completion_tokens += tokens
        self.end += tokens or 1
        if delta.finish_reason is not None:
            self.open_choices -= 1

    def finish(self, code: int, outcome: Outcome, now_ns: int) -> None:
        """Its terminal."""
        outcome.units = self.end
        self.code, self.outcome, self.finished_ns = code, outcome, now_ns

    def usage(self, reported: Usage | None, prompt_tokens: int) -> Usage:
        """What the engine reported, else what was seen."""
        return reported or Usage(prompt_tokens=prompt_tokens, completion_tokens=self.completion_tokens)

    def acknowledge(self, units: int) -> None:
        """The reader has everything before `units`: forget it."""
        drop = 0
        while drop < self.sent and self.first + self.deltas[drop].units <= units:
            self.first += self.deltas[drop].units
            drop += 1
        if drop:
            del self.deltas[:drop]
            self.sent -= drop

    def rewind(self, units: int) -> bool:
        """Send again from `units` on. False if that is not kept any more, or falls inside a delta."""
        offset, position = self.first, 0
        while offset < units and position < len(self.deltas):
            offset += self.deltas[position].units
            position += 1
        if offset != units:
            return False
        self.sent, self.next = position, units
        return True

    def take(self, worker: str) -> list[Chunk]:
        """Chunks of what may be sent now: all that is left once finished, else what the window allows."""
        if len(self.deltas) - self.sent == 1:
            return self._take_one(worker)
        chunks: list[Chunk] = []
        limit = None if self.finished else self.window
        run: list[Delta] = []
        offset = self.next
        while self.sent < len(self.deltas):
            delta = self.deltas[self.sent]
            units = len(delta.token_ids) or 1
            if limit is not None and self.next + units > limit:
                break
            if run and run[-1].index != delta.index:
                chunks.append(self._chunk(run, offset, worker))
                run, offset = [], self.next
            run.append(delta)
            self.sent += 1
            self.next += units
        if run:
            chunks.append(self._chunk(run, offset, worker))
        return chunks

    def _take_one(self, worker: str) -> list[Chunk]:
        """The usual case, a step's one delta, without what only runs need."""
        delta = self.deltas[self.sent]
        token_ids, offset = delta.token_ids, self.next
        following = offset + (len(token_ids) or 1)
        if following > self.window and self.outcome is None:
            return []
        self.sent += 1
        self.next = following
        if (
            not token_ids
            or delta.finish_reason is not None
            or offset == self.resumed
            or delta.logprobs is not None
            or delta.prompt_logprobs is not None
        ):
            return [self._chunk([delta], offset, worker)]
        return [Chunk(self.request, self.attempt, delta.index, offset, delta.text, token_ids)]

    def _chunk(self, run: list[Delta], offset: int, worker: str) -> Chunk:
        """A run of deltas of one choice as one chunk."""
        first, last = run[0], run[-1]
        if len(run) == 1:
            text, token_ids, units = first.text, first.token_ids, first.units
        else:
            text = "".join([delta.text for delta in run])
            token_ids = [token for delta in run for token in delta.token_ids]
            units = sum([delta.units for delta in run])
        extra: ChunkExtra | None = None
        starts = offset == self.resumed
        has_logprobs = first.logprobs is not None or last.logprobs is not None
        if starts or last.finish_reason is not None or has_logprobs or units != len(token_ids) or first.prompt_logprobs:
            extra = ChunkExtra(
                units=units if units != len(token_ids) else None,
                worker=worker if starts else None,
                finish_reason=last.finish_reason,
                logprobs=[entry for delta in run for entry in delta.logprobs or ()] if has_logprobs else None,
                prompt_logprobs=first.prompt_logprobs,
            )
        return Chunk(self.request, self.attempt, first.index, offset, text, token_ids, extra)
