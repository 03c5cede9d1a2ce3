"""One stream at its worker: what was made, what was sent, what the reader allows.

Rule 1: every delta is kept until the reader is known to have it, so that a stream can go on after a controller's death.
Rule 2: a unit is sent once per controller, in order, and only below the window; what is held back is merged, so that the
        next credit brings one larger chunk. A delta that reaches beyond the window is split at it.
Rule 3: the terminal is exempt from credit, and brings along whatever is left.
"""

from __future__ import annotations

import functools

from zfabric.core.worker.soundness import all_integers, check_ending, check_logprobs, check_parts, make_plain
from zfabric.core.worker.spans import StreamSpan
from zfabric.errors import BackendError
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.chunks import Chunks
from zfabric.wire.extra import merged
from zfabric.wire.fields import Operation
from zfabric.wire.payloads import Delta, Usage
from zfabric.wire.plain import encode_plain
from zfabric.wire.tool_calls import joined_calls
from zfabric.wire.traces import TraceContext

#: What is kept of a delta: all of it, or, where it is one token of the first choice and nothing else, its text and that token.
Kept = Delta | tuple[str, int]
#: Rough size of one kept delta, and of one log-probability, for the bound on finished answers: objects, not wire bytes.
_DELTA_BYTES = 200
_LOGPROB_BYTES = 150


class Backlog:
    """A request's answer as its worker has it."""

    __slots__ = (
        "attempt", "bare", "began_ns", "careful", "choices", "client", "closed", "code", "deltas", "end", "exact", "finished_ns",
        "first", "first_ns", "held_ns", "instance", "lock", "model", "next", "open_choices", "operation", "outcome", "rare",
        "request", "request_id", "resumed", "scored", "sent", "span", "trace", "window",
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
        lock: bytes = b"",
    ) -> None:
        self.request_id = request_id
        self.client: int | None = client
        self.instance = instance
        self.request = request
        self.attempt = attempt
        self.operation: Operation = operation
        self.model = model
        self.lock = lock
        self.window = window
        self.resumed = resume_from
        #: Whether another worker would draw the same text, which the first chunk tells.
        self.exact = False
        self.choices = self.open_choices = 1
        #: Bit set of the choices that have ended.
        self.closed = 0
        #: Whether the next delta is to be looked at closely.
        self.careful = True
        #: Whether any delta was more than text and tokens, and whether log-probabilities were looked at.
        self.rare = self.scored = False
        #: Deltas kept; `first` is the offset of deltas[0], `next` of deltas[sent], `end` after the last.
        self.deltas: list[Kept] = []
        self.first = self.next = self.end = resume_from
        self.sent = 0
        #: Units that are deltas without a token.
        self.bare = 0
        self.code: int | None = None
        self.outcome: Outcome | None = None
        #: When it came, when its first unit was there, since when it waits for credit, and when it ended; 0 for not.
        self.began_ns = self.first_ns = self.held_ns = self.finished_ns = 0
        #: Which trace it belongs to, and what that is told of it.
        self.trace: TraceContext | None = None
        self.span: StreamSpan | None = None

    @property
    def finished(self) -> bool:
        """Whether its terminal is known."""
        return self.outcome is not None

    @property
    def held_units(self) -> int:
        """Units made and not sent."""
        return self.end - self.next

    @property
    def completion_tokens(self) -> int:
        """Tokens that were made here."""
        return self.end - self.resumed - self.bare

    @property
    def bytes_kept(self) -> int:
        """About what keeping it costs."""
        size = _DELTA_BYTES * (len(self.deltas) + 4)
        size += sum([len(kept[0]) + 8 for kept in self.deltas if isinstance(kept, tuple)])
        deltas = [kept for kept in self.deltas if not isinstance(kept, tuple)]
        size += sum([len(delta.text) + 8 * len(delta.token_ids) for delta in deltas])
        if self.rare:
            size += sum([len(delta.reasoning) for delta in deltas])
            size += sum([_DELTA_BYTES + len(call.arguments) for delta in deltas for call in delta.tool_calls or ()])
            size += sum([len(encode_plain(delta.extra)) for delta in deltas if delta.extra])
        if deltas and (deltas[0].logprobs or deltas[0].prompt_logprobs):
            entries = [e for delta in deltas for e in (*(delta.logprobs or ()), *(delta.prompt_logprobs or ()))]
            size += _LOGPROB_BYTES * sum([1 + len(entry.top) for entry in entries if entry is not None])
        return size + (len(memoryview(self.outcome.result)) if self.outcome is not None else 0)

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def expect(self, choices: int) -> None:
        """Set how many choices the request asks for."""
        self.choices = self.open_choices = choices

    def add(self, delta: Delta) -> None:
        """Keep a new delta. One of a choice that has ended is dropped.

        Raises:
            BackendError: It is not what a delta has to be.
            Exception: It is not even a delta.
        """
        if (self.careful or delta.index != 0 or delta.text.__class__ is not str) and not self._admits(delta):
            return
        token_ids = delta.token_ids
        tokens = len(token_ids)
        if (tokens == 1 and token_ids[0].__class__ is not int) or (tokens > 1 and not all_integers(token_ids)):
            make_plain(delta)
            token_ids = delta.token_ids
        if (
            not tokens
            or delta.finish_reason is not None
            or delta.logprobs is not None
            or delta.prompt_logprobs
            or delta.reasoning
            or delta.tool_calls
            or delta.extra
        ):
            self._add_rare(delta)
            self.deltas.append(delta)
        elif tokens == 1 and delta.index == 0:
            self.deltas.append((delta.text, token_ids[0]))
        else:
            self.deltas.append(delta)
        self.end += tokens or 1

    def _admits(self, delta: Delta) -> bool:
        """Whether a delta is to be kept, made plain. The first one of a stream comes here, whatever it looks like, and
        those of other choices than the first. Raises: BackendError: It cannot be made plain, or has no such choice."""
        make_plain(delta)
        if not 0 <= delta.index < self.choices:
            raise BackendError(f"index of a delta is {delta.index}, choices here are 0 … {self.choices - 1}")
        self.careful = bool(self.closed)
        return not self.closed >> delta.index & 1

    def _add_rare(self, delta: Delta) -> None:
        """Look at what few deltas carry. Log-probabilities cost more to look at than to send: those of the first delta
        speak for the others, which the encoder still refuses where they are nothing that it knows."""
        self.rare = True
        self.bare += not delta.token_ids
        scored = delta.logprobs is not None or bool(delta.prompt_logprobs)
        if scored and not self.scored:
            check_logprobs(delta)
            self.scored = True
        if delta.reasoning or delta.tool_calls or delta.extra:
            check_parts(delta)
        if delta.finish_reason is not None:
            check_ending(delta)
            if self.span is not None:
                self.span.finish_reasons.append(delta.finish_reason)
            self.open_choices -= 1
            self.closed |= 1 << delta.index
            self.careful = True

    def finish(self, code: int, outcome: Outcome, now_ns: int) -> None:
        """Its terminal."""
        outcome.units = self.end
        self.code, self.outcome, self.finished_ns = code, outcome, now_ns

    def usage(self, reported: Usage | None, prompt_tokens: int) -> Usage:
        """What the engine reported, else what was seen."""
        return reported or Usage(prompt_tokens=prompt_tokens, completion_tokens=self.completion_tokens)

    # ── the reader's word ───────────────────────────────────────────────────────────────────────────────────────────

    def acknowledge(self, units: int) -> None:
        """The reader has everything before `units`: forget it."""
        deltas, first, drop = self.deltas, self.first, 0
        while drop < self.sent:
            kept = deltas[drop]
            following = first + units_of(kept)
            if following > units:
                break
            first = following
            drop += 1
        self.first = first
        if drop:
            del self.deltas[:drop]
            self.sent -= drop

    def rewind(self, units: int) -> bool:
        """Send again from `units` on. False if that is not kept any more, or was never made."""
        if not self.first <= units <= self.end:
            return False
        self.sent, self.next = self._position(units), units
        return True

    def truncate(self, units: int) -> None:
        """Forget everything from `units` on: it cannot be sent. What was sent before stays for a reader that lacks it."""
        position = self._position(units)
        self.bare -= sum([not whole(kept).token_ids for kept in self.deltas[position:]])
        del self.deltas[position:]
        self.sent = min(self.sent, position)
        self.next, self.end = min(self.next, units), units

    def clear(self, units: int) -> None:
        """Forget everything: the reader has what is before `units`, and what would follow is not kept."""
        self.deltas.clear()
        self.sent = 0
        self.first = self.next = self.end = units

    def _position(self, units: int) -> int:
        """Where in `deltas` this offset is; a delta that it falls into is split there."""
        offset, position = self.first, 0
        while offset < units:
            size = units_of(self.deltas[position])
            if offset + size > units:
                self._split(position, units - offset)
                size = units - offset
            offset += size
            position += 1
        return position

    def _split(self, position: int, tokens: int) -> None:
        """Make two deltas of one, after so many of its tokens.

        Text, reasoning and calls go with the last part: who goes on elsewhere from the first one has no text beyond its tokens.
        """
        delta = whole(self.deltas[position])
        scores = delta.logprobs
        apart = scores is not None and len(scores) == len(delta.token_ids)
        head = Delta(
            token_ids=delta.token_ids[:tokens],
            index=delta.index,
            logprobs=scores[:tokens] if scores is not None and apart else None,
            prompt_logprobs=delta.prompt_logprobs,
        )
        rest = Delta(
            text=delta.text,
            token_ids=delta.token_ids[tokens:],
            index=delta.index,
            logprobs=scores[tokens:] if scores is not None and apart else scores,
            finish_reason=delta.finish_reason,
            usage=delta.usage,
            reasoning=delta.reasoning,
            tool_calls=delta.tool_calls,
            extra=delta.extra,
            stop_reason=delta.stop_reason,
        )
        self.deltas[position : position + 1] = [head, rest]

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, columns: Chunks, worker: str) -> bool:
        """Add chunks of what may be sent now: all that is left once finished, else what the window allows.

        Returns:
            Whether something is held back until there is credit for it.
        """
        deltas, sent = self.deltas, self.sent
        if len(deltas) - sent == 1:
            kept, offset = deltas[sent], self.next
            allowed = offset < self.window or self.outcome is not None
            if isinstance(kept, tuple) and allowed and not self.attempt and offset != self.resumed:
                # The usual case, a step's one token.
                self.sent, self.next = sent + 1, offset + 1
                columns.requests.append(self.request)
                columns.offsets.append(offset)
                columns.texts.append(kept[0])
                columns.tokens.append(kept[1])
                return False
        for chunk in self.chunks(worker):
            columns.add(chunk)
        return self.sent < len(deltas)

    def chunks(self, worker: str) -> list[Chunk]:
        """As `take`, for any number of deltas, and a window that ends within one."""
        chunks: list[Chunk] = []
        limit = None if self.finished else self.window
        run: list[Delta] = []
        offset = self.next
        while self.sent < len(self.deltas):
            delta = whole(self.deltas[self.sent])
            units = len(delta.token_ids) or 1
            if limit is not None and self.next + units > limit:
                if self.next >= limit:
                    break
                units = limit - self.next
                self._split(self.sent, units)
                delta = whole(self.deltas[self.sent])
            if run and run[-1].index != delta.index:
                chunks.append(self._chunk(run, offset, worker))
                run, offset = [], self.next
            run.append(delta)
            self.sent += 1
            self.next += units
        if run:
            chunks.append(self._chunk(run, offset, worker))
        return chunks

    def halves(self, chunk: Chunk, worker: str) -> list[Chunk]:
        """The same units as two chunks, or the one chunk where it is a single unit."""
        extra = chunk.extra
        units = len(chunk.token_ids) if extra is None or extra.units is None else extra.units
        if units < 2 or chunk.offset < self.first:
            return [chunk]
        middle = chunk.offset + units // 2
        # The first look may split a delta there, which moves the positions after it.
        self._position(middle)
        begin, between, end = (self._position(at) for at in (chunk.offset, middle, chunk.offset + units))
        self.sent = self._position(self.next)
        return [
            self._chunk([whole(kept) for kept in self.deltas[begin:between]], chunk.offset, worker),
            self._chunk([whole(kept) for kept in self.deltas[between:end]], middle, worker),
        ]

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
        reasoning = "".join([delta.reasoning for delta in run]) if self.rare else ""
        calls = joined_calls([call for delta in run for call in delta.tool_calls or ()]) if self.rare else None
        told = functools.reduce(merged, [delta.extra for delta in run]) if self.rare else None
        plain = last.finish_reason is None and not (has_logprobs or first.prompt_logprobs or reasoning or calls or told)
        if starts or not plain or units != len(token_ids):
            extra = ChunkExtra(
                units=units if units != len(token_ids) else None,
                worker=worker if starts else None,
                finish_reason=last.finish_reason,
                logprobs=[entry for delta in run for entry in delta.logprobs or ()] if has_logprobs else None,
                prompt_logprobs=first.prompt_logprobs,
                exact=starts and self.exact,
                reasoning=reasoning,
                tool_calls=calls,
                extra=told,
                stop_reason=last.stop_reason if last.finish_reason is not None else None,
            )
        return Chunk(self.request, self.attempt, first.index, offset, text, token_ids, extra)


def whole(kept: Kept) -> Delta:
    """What is kept of a delta as the delta that it was."""
    return Delta(text=kept[0], token_ids=[kept[1]]) if isinstance(kept, tuple) else kept


def units_of(kept: Kept) -> int:
    """How far it moves the stream's offset."""
    return 1 if isinstance(kept, tuple) else kept.units
