"""A gateway's figures as metrics."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric

from zfabric.gateway.figures import Figures
from zfabric.monitoring.families import counter, gauge, histogram


def metrics_of(figures: Figures) -> list[Metric]:
    """All that a gateway tells of itself. Call it on the loop's thread."""
    answers = figures.answers
    return [
        counter(
            "zfabric_gateway_requests",
            "HTTP requests that ended, by path, model and status; 499 where the caller went away.",
            {(path, model, str(status)): count for (path, model, status), count in figures.requests.items()},
            "path", "model", "status",
        ),
        histogram(
            "zfabric_gateway_request_seconds",
            "From a request's head to the end of its response.",
            {(path,): taken for path, taken in figures.whole_time.items()},
            "path",
        ),
        histogram(
            "zfabric_gateway_time_to_first_token_seconds",
            "From a request's head to the first token of its answer.",
            {(model,): it.first_token for model, it in answers.items()},
            "model",
        ),
        histogram(
            "zfabric_gateway_time_per_output_token_seconds",
            "The mean time between tokens of each answer, from its first one to its end.",
            {(model,): it.between_tokens for model, it in answers.items()},
            "model",
        ),
        counter(
            "zfabric_gateway_tokens",
            "Tokens of answers that came to their end.",
            {
                (model, kind): count
                for model, it in answers.items()
                for kind, count in (("prompt", it.prompt_tokens), ("completion", it.completion_tokens))
            },
            "model", "kind",
        ),
        gauge("zfabric_gateway_streams", "Streams of events that are open.", figures.streams),
        counter(
            "zfabric_gateway_body_bytes",
            "Bytes of bodies of requests that ended, received and sent.",
            {("received",): figures.received_bytes, ("sent",): figures.sent_bytes},
            "direction",
        ),
        counter("zfabric_gateway_disconnects", "Callers that went away before they had their answer.", figures.disconnects),
    ]  # fmt: skip
