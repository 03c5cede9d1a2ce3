"""Questions to the controller: each is answered, refused, or given up in time.

A question is asked again on every new session, so it must be one without side effects, or one that may be done twice.
It has another number each time: what a former session still answers is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Raw

from zfabric.core.client.pending import Inquirer
from zfabric.core.timers import Timer, Timers
from zfabric.errors import DeadlineExceededError, FabricError, RequestError, TooLargeError, from_wire
from zfabric.ids import milliseconds
from zfabric.limits import CONTROL_BODY_BYTES_MAX
from zfabric.wire import codec
from zfabric.wire.questions import Answer, Query


class Inquiry:
    """One question that has not been answered."""

    __slots__ = ("arguments", "asked_ns", "inquirer", "number", "results", "timer", "what")

    def __init__(self, what: str, arguments: dict[str, object], inquirer: Inquirer, asked_ns: int) -> None:
        self.what = what
        self.arguments = arguments
        self.inquirer = inquirer
        self.asked_ns = asked_ns
        self.number = -1
        self.results: list[Raw] = []
        self.timer: Timer | None = None


class Inquiries:
    """All open questions of one client.

    Args:
        timers: The session's.
        unavailable: Why nobody answers at all, if there is no session.
    """

    def __init__(self, timers: Timers, unavailable: Callable[[], FabricError | None]) -> None:
        self._timers = timers
        self._unavailable = unavailable
        self._open: dict[int, Inquiry] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def oldest_ns(self) -> int | None:
        """When the first of them was asked."""
        return min((inquiry.asked_ns for inquiry in self._open.values()), default=None)

    def add(
        self, what: str, arguments: dict[str, object], inquirer: Inquirer, now_ns: int, timeout_ms: int
    ) -> tuple[Inquiry, codec.Frames]:
        """Enter a question. Returns it, and what to send if there is a session.

        Raises:
            RequestError, TooLargeError: It cannot be sent.
        """
        inquiry = Inquiry(what, arguments, inquirer, now_ns)
        frames = self._numbered(inquiry)
        inquiry.timer = self._timers.at(now_ns + milliseconds(timeout_ms), lambda _: self._expire(inquiry, timeout_ms))
        return inquiry, frames

    def again(self) -> list[codec.Frames]:
        """All open questions, for a new session."""
        waiting, self._open = list(self._open.values()), {}
        for inquiry in waiting:
            inquiry.results.clear()
        return [self._numbered(inquiry) for inquiry in waiting]

    def _numbered(self, inquiry: Inquiry) -> codec.Frames:
        self._number += 1
        try:
            frames = codec.pack(Query(number=self._number, what=inquiry.what, arguments=inquiry.arguments))
        except Exception as error:  # noqa: BLE001 — whatever a value of the caller's raises is its own fault
            raise RequestError(f"arguments of {inquiry.what} cannot be sent: {error}", parameter="arguments") from None
        size = len(frames[0])
        if size > CONTROL_BODY_BYTES_MAX:
            raise TooLargeError(
                f"query {inquiry.what} holds {size} bytes, limit is {CONTROL_BODY_BYTES_MAX}",
                parameter="arguments",
                size=size,
                limit=CONTROL_BODY_BYTES_MAX,
            )
        inquiry.number = self._number
        self._open[self._number] = inquiry
        return frames

    def forget(self, inquiry: Inquiry) -> None:
        """The asker went away."""
        self._open.pop(inquiry.number, None)
        self._timers.cancel(inquiry.timer)

    def answer(self, answer: Answer) -> None:
        """Take an answer, or one part of it."""
        inquiry = self._open.get(answer.number)
        if inquiry is None:
            return
        if answer.code:
            self._end(inquiry, from_wire(answer.code, answer.message, answer.details))
            return
        inquiry.results.append(answer.result)
        if not answer.more:
            self._end(inquiry, None)

    def fail(self, number: int, error: FabricError) -> bool:
        """End a question with an error. False if there is none of this number."""
        inquiry = self._open.get(number)
        if inquiry is not None:
            self._end(inquiry, error)
        return inquiry is not None

    def abandon(self, error: FabricError, asked_by_ns: int | None = None) -> None:
        """End all that were asked by then, or all."""
        for inquiry in list(self._open.values()):
            if asked_by_ns is None or inquiry.asked_ns <= asked_by_ns:
                self._end(inquiry, error)

    def _expire(self, inquiry: Inquiry, timeout_ms: int) -> None:
        error = self._unavailable() or DeadlineExceededError(
            f"the controller did not answer {inquiry.what} within {timeout_ms} ms", what=inquiry.what
        )
        self._end(inquiry, error)

    def _end(self, inquiry: Inquiry, error: FabricError | None) -> None:
        self.forget(inquiry)
        inquiry.inquirer.answered(error, inquiry.results if error is None else [])
