"""What spans are called and what they say, by OpenTelemetry's conventions for generative AI.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ has the names that begin with `gen_ai.`; what the fabric adds
begins with `zfabric.`. No prompt and no text is ever told.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import Attributes, AttributeValue

from zfabric.errors import BY_CODE, FabricError
from zfabric.wire.payloads import AnyRequest, CountRequest, TextRequest, Usage
from zfabric.wire.tasks import EmbedRequest
from zfabric.wire.traces import TraceContext

__all__ = ["Attributes", "SpanKind", "Values", "error_attributes", "span_context", "status_of"]

Values = dict[str, AttributeValue]

#: The instrumentation's name.
SCOPE: Final = "zfabric"
#: Operations that the conventions have a name for; the others are called as the fabric calls them.
_NAMES: Final = {"generate": "text_completion", "embed": "embeddings"}
#: Parameters of a request for text, and what the conventions call them.
_PARAMETERS: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_new_tokens": "max_tokens",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
}


def operation_name(operation: str, request: AnyRequest | None = None) -> str:
    """What the conventions call an operation. A request for text is one of a chat where it has messages."""
    if isinstance(request, TextRequest) and request.messages is not None:
        return "chat"
    return _NAMES.get(operation, operation)


def common(name: str, model: str) -> Values:
    """What every span of a request says."""
    return {"gen_ai.operation.name": name, "gen_ai.provider.name": SCOPE, "gen_ai.request.model": model}


def asked(request: AnyRequest) -> Values:
    """The parameters of a request."""
    found: Values = {}
    if isinstance(request, TextRequest):
        sampling = request.sampling
        for field, name in _PARAMETERS.items():
            value = getattr(sampling, field)
            # Below zero is what the context leaves.
            if value is not None and not (field == "max_new_tokens" and value <= 0):
                found[f"gen_ai.request.{name}"] = value
        if sampling.stop:
            found["gen_ai.request.stop_sequences"] = list(sampling.stop)
        if sampling.n != 1:
            found["gen_ai.request.choice.count"] = sampling.n
    elif isinstance(request, EmbedRequest) and request.dimensions is not None:
        found["gen_ai.embeddings.dimension.count"] = request.dimensions
    elif isinstance(request, CountRequest):
        found["zfabric.chat"] = request.messages is not None
    return found


def counted(usage: Usage) -> Values:
    """Exact token counts."""
    found: Values = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
    }
    if usage.cached_tokens:
        found["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
    return found


def error_attributes(code: int) -> Values:
    """An error, by its class and its code."""
    return {"error.type": BY_CODE.get(code, FabricError).__name__, "zfabric.error.code": code}


def status_of(code: int, message: str = "") -> Status:
    """Whether it went well."""
    return Status(StatusCode.ERROR, message or None) if code else Status(StatusCode.UNSET)


def span_context(context: TraceContext, *, remote: bool) -> SpanContext:
    """As OpenTelemetry has it."""
    state = TraceState.from_header([context.state]) if context.state else None
    return SpanContext(context.trace_id, context.span_id, remote, TraceFlags(context.flags), state)


def trace_context(context: SpanContext) -> TraceContext:
    """As the fabric has it."""
    return TraceContext(context.trace_id, context.span_id, int(context.trace_flags), context.trace_state.to_header())
