"""A recording as lines that people read, and what of it they want to see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zfabric.recording.reader import Event

#: What stands in a column of its own.
_COLUMNS = ("request", "worker")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which events are wanted; an empty text is any.

    Attributes:
        request: The name of a request at its client, or its beginning. All of its attempts are wanted.
        model: A model that a request asks for, or that a worker serves.
        worker: The name of a worker.
        name: What happened.
    """

    request: str = ""
    model: str = ""
    worker: str = ""
    name: str = ""

    def of(self, events: Iterable[Event]) -> Iterator[Event]:
        """The wanted ones. What happens to a request is of the model and the workers that it had before."""
        models: dict[str, set[str]] = {}
        for event in events:
            request = event.request
            named = _models_of(event)
            if request:
                known = models.setdefault(request, set())
                known |= named
                named = known
            if self._wants(event, request, named):
                yield event

    def _wants(self, event: Event, request: str, models: set[str]) -> bool:
        return (
            (not self.request or request.startswith(self.request))
            and (not self.model or self.model in models)
            and (not self.worker or event.fields.get("worker") == self.worker)
            and (not self.name or event.name == self.name)
        )


def as_row(event: Event, begin_ns: int) -> dict[str, Any]:
    """An event for programs: the time of the day, seconds since the first event, and its values."""
    values = {key: value for key, value in event.fields.items() if key != "request"}
    named = {"request": event.request, "attempt": event.attempt} if event.request else {}
    return {
        "unix_ns": event.unix_ns,
        "after_s": round((event.unix_ns - begin_ns) / 1e9, 6),
        "of": event.of,
        "event": event.name,
        **named,
        **values,
    }


def details_of(event: Event) -> str:
    """Its values that have no column of their own, as `name=value`."""
    return " ".join(
        f"{key}={_shown(value)}"
        for key, value in event.fields.items()
        if key not in _COLUMNS and value not in ("", None, [], False)
    )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, str) and " " in value else str(value)


def _models_of(event: Event) -> set[str]:
    found: set[str] = set()
    for key in ("model", "models", "gained", "dropped"):
        value = event.fields.get(key)
        found.update(name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str))
    return found
