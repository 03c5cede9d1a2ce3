"""Where two answers to the same request differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tests.compatibility.cases import Case
from tests.compatibility.observe import Observed

#: What stands in a difference for something that the other side alone has.
ABSENT: Final = "absent"
#: What depends on the machine is compared, but not shown.
_HIDDEN: Final = ("text ", "logprobs ", "alternatives ", "text_offset ", "calls ")


@dataclass(frozen=True)
class Difference:
    """One difference of one request.

    Attributes:
        case: The request's name.
        aspect: What differs: "status", "error.type", "choices[].text", "order of choice 0", "usage.prompt_tokens", …
        theirs: What vLLM's server says, in short.
        ours: What the gateway says.
    """

    case: str
    aspect: str
    theirs: str
    ours: str


def differences(case: Case, theirs: Observed, ours: Observed) -> list[Difference]:
    """All differences of one request. After one of the status nothing else can be compared."""

    def told(aspect: str, one: Any, other: Any) -> list[Difference]:
        if one == other:
            return []
        if aspect.startswith(_HIDDEN):
            one, other = "another", "one"
        return [Difference(case.name, aspect, _short(one), _short(other))]

    if theirs.status != ours.status:
        return told("status", theirs.status, ours.status)
    found = told("content type", theirs.kind, ours.kind)
    if theirs.error is not None or ours.error is not None:
        one, other = theirs.error or {}, ours.error or {}
        for name in sorted({*one, *other} - {"message"}):
            found += told(f"error.{name}", one.get(name, ABSENT), other.get(name, ABSENT))
    if theirs.kind == ours.kind:
        for path in sorted({*theirs.fields, *ours.fields}):
            found += told(path, _kinds(theirs, path), _kinds(ours, path))
        for name in sorted({*theirs.order, *ours.order}):
            found += told(f"order of {name}", theirs.order.get(name, ABSENT), ours.order.get(name, ABSENT))
        for name in sorted({*theirs.values, *ours.values}):
            found += told(name, theirs.values.get(name, ABSENT), ours.values.get(name, ABSENT))
    return found


def _kinds(observed: Observed, path: str) -> str:
    return " or ".join(sorted(observed.fields.get(path, {ABSENT})))


def _short(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
