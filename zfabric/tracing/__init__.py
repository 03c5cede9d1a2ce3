"""Spans of requests as OpenTelemetry has them: needs `zfabric[tracing]`, and is imported by nothing that does not trace."""
