"""What daemons export with --traces, as a collector of OTLP over HTTP gets it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import signal
import socket
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.fabric import Process, processes
from zfabric.cli import controller, gateway, worker
from zfabric.cli.traces import traces_to
from zfabric.errors import ConfigurationError
from zfabric.tracing.provider import provider_of

CONTROLLER, WORKER, GATEWAY = "zfabric.cli.controller", "zfabric.cli.worker", "zfabric.cli.gateway"
#: What the operators' page says of it.
SECTION = (
    (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text().split("## Tracing")[1].split("\n## ")[0]
)
ABOVE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """A collector on a thread: keeps (service, span) of all that it is sent."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                asked = ExportTraceServiceRequest()
                asked.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in asked.resource_spans:
                    named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        collector.spans += [(named["service.name"], span) for span in scope.spans]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 — the name that the base class has
                """Nothing of it is news."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def one(self, service: str, name: str) -> Span:
        (span,) = [span for of, span in self.spans if of == service and span.name.startswith(name)]
        return span


def ask(url: str) -> dict[str, object]:
    body = json.dumps(
        {"model": "echo", "messages": [{"role": "user", "content": "one two"}], "temperature": 0}
    ).encode()
    headers = {"content-type": "application/json", "traceparent": ABOVE}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/chat/completions", body, headers), timeout=60
    ) as answer:
        found: dict[str, object] = json.loads(answer.read())
    return found


async def test_a_call_over_http_is_one_trace_of_three_processes(ipc: str, run_directory: Path) -> None:
    with Collector() as collector:
        async with processes(run_directory) as children:
            ready = []
            for module, *arguments in (
                [CONTROLLER, "--traces", collector.url],
                [WORKER, "--name", "w", "--traces", "env"],
                [GATEWAY, "--port", "0", "--traces", f"{collector.url}/v1/traces"],
            ):
                child = await Process.start(
                    module, "--endpoint", ipc, *arguments, directory=run_directory,
                    OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
                )  # fmt: skip
                children.append(child)
                ready.append(await child.ready())
            answer = await asyncio.to_thread(ask, ready[-1].partition("url=")[2])
            # Whoever ends exports what it has.
            for child in reversed(children):
                child.kill(signal.SIGTERM)
                assert await child.ended() == 0, child.log.read_text()
        client, attempt = collector.one("zfabric-gateway", "chat echo"), collector.one("zfabric-controller", "attempt")
        server, engine = collector.one("zfabric-worker", "text_completion"), collector.one("zfabric-worker", "engine")
        assert client.parent_span_id.hex() == ABOVE.split("-")[2]
        for above, span in ((client, attempt), (attempt, server), (server, engine)):
            assert span.parent_span_id == above.span_id
        assert {span.trace_id.hex() for _, span in collector.spans} == {ABOVE.split("-")[1]}
        assert client.kind == Span.SPAN_KIND_CLIENT
        assert server.kind == Span.SPAN_KIND_SERVER
        told = {pair.key: pair.value for pair in client.attributes}
        usage = answer["usage"]
        assert isinstance(usage, dict)
        assert told["gen_ai.usage.output_tokens"].int_value == usage["completion_tokens"]


async def test_what_cannot_be_exported_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    logged: list[tuple[str, str]] = []
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        async with traces_to(endpoint, "x", lambda event, error: logged.append((event, error))) as provider:
            assert provider is not None
            provider.get_tracer("x").start_span("y").end()
    assert logged
    assert {event for event, _ in logged} == {"traces_failed"}
    assert not logging.getLogger("opentelemetry").handlers


@pytest.mark.parametrize("line", re.findall(r"^zfabric-.*", SECTION, re.MULTILINE))
def test_commands_of_the_page_are_what_the_parsers_take(line: str) -> None:
    name, *arguments = shlex.split(line)
    build: Any = {"zfabric-controller": controller, "zfabric-worker": worker, "zfabric-gateway": gateway}[name].build
    _, bound, _ = build(arguments).parse_args(arguments, print_error=False, exit_on_error=False)
    given = {**bound.arguments, **vars(bound.arguments.get("settings", SimpleNamespace()))}
    assert given["traces"] == arguments[arguments.index("--traces") + 1]


async def test_the_program_of_the_page_runs_as_it_stands(ipc: str, run_directory: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    async with processes(run_directory) as children:
        for module, *arguments in ([CONTROLLER], [WORKER, "--backend", "echo"]):
            child = await Process.start(module, "--endpoint", ipc, *arguments, directory=run_directory)
            children.append(child)
            await child.ready()
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", block, stdout=asyncio.subprocess.PIPE, env={**os.environ, "ZFABRIC_ENDPOINT": ipc}
        )
        assert (await program.communicate())[0].decode() == "Hello there Hello there \n"


@pytest.mark.parametrize("wrong", ["", "localhost:4318", "4318", "ftp://host", "http://"])
def test_what_is_no_collector_is_named(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="no endpoint for traces"):
        provider_of("x", wrong)
