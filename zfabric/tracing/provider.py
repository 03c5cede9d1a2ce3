"""The tracer provider of a daemon: what its spans say of the process, and where they go."""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from zfabric.errors import ConfigurationError
from zfabric.version import __version__

#: Stands for what OTEL_EXPORTER_OTLP_… variables say.
ENVIRONMENT: Final = "env"
#: Where the endpoint of a collector takes traces, as the OTLP specification has it.
_PATH: Final = "/v1/traces"


def provider_of(service: str, endpoint: str, instance: str = "") -> TracerProvider:
    """A provider that exports by OTLP over HTTP, in batches and on a thread of its own.

    Sampling, limits, headers and all else are as the OTEL_… variables of OpenTelemetry's SDK say.

    Args:
        service: The daemon's name, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES have another.
        endpoint: Of the collector, as http://localhost:4318; "env" for that of the environment.
        instance: Which of several it is.

    Raises:
        ConfigurationError: The endpoint is none.
    """
    exporter = OTLPSpanExporter(endpoint=None if endpoint == ENVIRONMENT else _url(endpoint))
    provider = TracerProvider(resource=_resource(service, instance))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigurationError(
            f"{endpoint!r} is no endpoint for traces: a URL as http://localhost:4318 is wanted, or {ENVIRONMENT}",
            endpoint=endpoint,
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + _PATH


def _resource(service: str, instance: str) -> Resource:
    given = Resource.create()
    name = str(given.attributes.get("service.name", ""))
    own = {"service.version": __version__, "service.instance.id": instance or str(os.getpid())}
    if not name or name.startswith("unknown_service"):
        # Whatever was merged last holds.
        return Resource(own).merge(given).merge(Resource({"service.name": service}))
    return Resource(own).merge(given)
