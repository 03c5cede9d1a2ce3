"""The requests of a recording, each put together from its events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from zfabric.errors import ConfigurationError
from zfabric.recording.reader import Event

T = TypeVar("T")


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
    """All requests whose first event is their submission, in order of arrival. Others began before the recording did.

    Raises:
        ConfigurationError: An event lacks a value, or has one of a wrong type.
    """
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
    return RecordedRequest(
        name=event.request,
        client=_value(event, "client", str),
        operation=_value(event, "operation", str),
        model=_value(event, "model", str),
        priority=_value(event, "priority", int),
        deadline_ms=_number(event, "deadline_ms"),
        bytes=_value(event, "bytes", int),
        submitted_ns=event.unix_ns,
    )


def _follow(request: RecordedRequest, event: Event) -> None:
    if event.name == "dispatched":
        request.dispatched_ns = request.dispatched_ns or event.unix_ns
        request.workers = (*request.workers, _value(event, "worker", str))
        request.model = _value(event, "model", str) or request.model
    elif event.name == "ended":
        request.outcome, request.ended_ns = _value(event, "outcome", str), event.unix_ns
    elif event.name == "answered":
        request.units += _value(event, "units", int)
        request.prompt_tokens = max(request.prompt_tokens, _number(event, "prompt_tokens") or 0)


def _number(event: Event, name: str) -> int | None:
    return None if event.fields.get(name, 0) is None else _value(event, name, int)


def _value(event: Event, name: str, kind: type[T]) -> T:
    """A value of an event. Raises: ConfigurationError: The recording has none of that type, so no controller wrote it."""
    value = event.fields.get(name)
    if not isinstance(value, kind):
        raise ConfigurationError(f"{event.name} in a recording has {name}={value!r}, it must be of {kind.__name__}")
    return value
