"""The requests of a recording, each put together from its events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from zfabric.recording.reader import Event


@dataclass
class RecordedRequest:
    """One request, over all of its attempts.

    Attributes:
        name: At its client.
        client: Whose it is, as operators know it.
        operation, model, priority, deadline_ms, bytes: Of its first attempt. Once it is dispatched, `model` is the model's own
            name, also where an alias was asked for.
        submitted_ns, ended_ns: In nanoseconds since 1970; `ended_ns` is 0 for one that had not ended.
        attempts: How many there were.
        dispatched_ns: When a worker got it first; 0 for never.
        workers: Who got it, in order.
        outcome: How the last attempt ended; "" for one that had not.
        units, prompt_tokens: Of the answer and of the prompt, as workers recorded them; 0 where none did.
    """

    name: str
    client: str
    operation: str
    model: str
    priority: int
    deadline_ms: int | None
    bytes: int
    submitted_ns: int
    ended_ns: int = 0
    attempts: int = 1
    dispatched_ns: int = 0
    workers: tuple[str, ...] = ()
    outcome: str = ""
    units: int = 0
    prompt_tokens: int = 0

    @property
    def running_s(self) -> float:
        """From its first dispatch to its end."""
        return max(0.0, (self.ended_ns - self.dispatched_ns) / 1e9) if self.dispatched_ns and self.ended_ns else 0.0


def requests_of(events: Iterable[Event]) -> list[RecordedRequest]:
    """All requests whose first event is their submission, in order of arrival. Others began before the recording did."""
    found: dict[str, RecordedRequest] = {}
    for event in events:
        known = found.get(event.request)
        if event.name == "submitted":
            if known is None:
                found[event.request] = _begun(event)
            else:
                known.attempts += 1
        elif known is not None:
            _follow(known, event)
    return list(found.values())


def _begun(event: Event) -> RecordedRequest:
    fields = event.fields
    return RecordedRequest(
        name=event.request,
        client=fields["client"],
        operation=fields["operation"],
        model=fields["model"],
        priority=fields["priority"],
        deadline_ms=fields["deadline_ms"],
        bytes=fields["bytes"],
        submitted_ns=event.unix_ns,
    )


def _follow(request: RecordedRequest, event: Event) -> None:
    fields = event.fields
    if event.name == "dispatched":
        request.dispatched_ns = request.dispatched_ns or event.unix_ns
        request.workers = (*request.workers, fields["worker"])
        request.model = fields["model"] or request.model
    elif event.name == "ended":
        request.outcome, request.ended_ns = fields["outcome"], event.unix_ns
    elif event.name == "answered":
        request.units += fields["units"]
        request.prompt_tokens = max(request.prompt_tokens, fields["prompt_tokens"] or 0)
