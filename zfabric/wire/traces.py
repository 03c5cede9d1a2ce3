"""W3C trace context: which trace a request belongs to, as `traceparent` and `tracestate` say it.

https://www.w3.org/TR/trace-context/ has the form of both. What is malformed is as if it were not there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from zfabric.limits import TRACEPARENT_LENGTH_MAX, TRACESTATE_LENGTH_MAX

_SAMPLED: Final = 1
_PARENT: Final = re.compile(r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
                            r"(?P<more>-.*)?")  # fmt: skip
_KEY: Final = r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
_VALUE: Final = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER: Final = re.compile(f"{_KEY}={_VALUE}")
#: As many as the specification has.
_MEMBERS_MAX: Final = 32


class TraceContext(NamedTuple):
    """A span that others belong below.

    Attributes:
        trace_id: 128 bits, not zero.
        span_id: 64 bits, not zero: the span itself.
        flags: Eight bits; the lowest says that the trace is recorded.
        state: What others noted for themselves, passed on as it came.

    Example:
        >>> parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").sampled
        True
    """

    trace_id: int
    span_id: int
    flags: int = _SAMPLED
    state: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the trace is recorded."""
        return bool(self.flags & _SAMPLED)

    @property
    def traceparent(self) -> str:
        """As the header says it."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"

    @property
    def headers(self) -> dict[str, str]:
        """As HTTP carries it."""
        return {"traceparent": self.traceparent, **({"tracestate": self.state} if self.state else {})}

    def below(self, span_id: int) -> TraceContext:
        """The context of a span of the same trace."""
        return self._replace(span_id=span_id)


def parse(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """The context that two headers tell; None where `traceparent` is none."""
    found = _PARENT.fullmatch(traceparent) if len(traceparent) <= TRACEPARENT_LENGTH_MAX else None
    if found is None or found["version"] == "ff" or (found["version"] == "00" and found["more"]):
        return None
    trace_id, span_id, flags = int(found["trace"], 16), int(found["span"], 16), int(found["flags"], 16)
    if not trace_id or not span_id:
        return None
    # Of a later version only the first flag is sure to mean the same.
    flags = flags if found["version"] == "00" else flags & _SAMPLED
    return TraceContext(trace_id, span_id, flags, tracestate if _is_state(tracestate) else "")


def log_name(traceparent: str) -> dict[str, str]:
    """What a trace is called in logs: nothing, where there is none."""
    context = parse(traceparent) if traceparent else None
    return {} if context is None else {"trace": f"{context.trace_id:032x}"}


def parse_headers(headers: Mapping[str, str]) -> TraceContext | None:
    """As `parse`, of headers with names in lower case."""
    return parse(headers.get("traceparent", ""), headers.get("tracestate", ""))


def _is_state(text: str) -> bool:
    members = [member.strip(" \t") for member in text.split(",")]
    given = [member for member in members if member]
    if len(text) > TRACESTATE_LENGTH_MAX or len(given) > _MEMBERS_MAX:
        return False
    return all(map(_MEMBER.fullmatch, given)) and len({member.partition("=")[0] for member in given}) == len(given)
