"""Traces from a caller's span through queue, worker and engine, as an exporter in memory has them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from tests.fabric import Fabric, Process, at_rest, fabric, processes
from tests.traces import Recorded, events_of, id_of, parent_of, said
from zfabric import AsyncClient, BaseModelWorker, Client, Delta, GenerateRequest, ModelInfo
from zfabric.client.traces import below
from zfabric.errors import BackendError, ConfigurationError, RequestCancelledError, UnknownModelError
from zfabric.wire.traces import parse_headers
from zfabric.worker.traces import trace_headers

WORKER = "zfabric.cli.worker"
ABOVE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=a"}


class Told(BaseModelWorker):
    """Says in whose trace it works, one word at a time as its gate opens."""

    parameters = frozenset({"max_new_tokens", "temperature"})

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.current: list[int] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()

    async def load(self) -> ModelInfo:
        return ModelInfo(name="m", capabilities=["generate", "chat"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.headers.append(trace_headers())
        self.current.append(trace.get_current_span().get_span_context().span_id)
        if request.prompt == "fail":
            raise BackendError("the engine coughed")
        if request.prompt == "break":
            raise RuntimeError("a bug")
        yield Delta(text="one ", token_ids=[1])
        self.begun.set()
        await self.gate.wait()
        yield Delta(text="two", token_ids=[2], finish_reason="stop")


async def ended(made: Fabric) -> None:
    """Wait until all spans are made: a controller tells of an attempt when its worker has stopped."""
    await at_rest(made.controller)
    made.controller.link_idle()
    for service in made.services.values():
        assert service._links is not None
        service._links.settle()


def check_tree(*spans: ReadableSpan) -> None:
    """Each is below the one before, in the same trace, and ended after it began."""
    for above, span in itertools.pairwise(spans):
        assert parent_of(span) == id_of(above), span.name
    for span in spans:
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time >= span.start_time > 0
    assert len({span.context.trace_id for span in spans if span.context is not None}) == 1


async def test_a_request_is_one_trace_from_its_caller_to_its_engine(ipc: str) -> None:
    recorded, backend = Recorded(), Told()
    backend.gate.set()
    async with fabric(ipc, traces=recorded.controller()) as made:
        await made.add_worker("w", backend, traces=recorded.worker("w"))
        async with AsyncClient(made.endpoint, tracing=recorded.client) as client:
            with recorded.client.get_tracer("program").start_as_current_span("handler"):
                stream = client.stream(
                    "m", messages=[{"role": "user", "content": "x"}], temperature=0.5, max_new_tokens=8
                )
                completion = await stream
        await ended(made)
    top, mine = recorded.one("client", "handler"), recorded.one("client", "chat")
    attempt, queue = recorded.one("controller", "attempt"), recorded.one("controller", "queue")
    server, engine = recorded.one("w", "text_completion"), recorded.one("w", "engine")
    check_tree(top, mine, attempt, server, engine)
    check_tree(attempt, queue)
    assert [span.kind for span in (mine, attempt, server)] == [SpanKind.CLIENT, SpanKind.INTERNAL, SpanKind.SERVER]
    assert said(mine) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "zfabric",
        "gen_ai.request.model": "m",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.response.id": stream.request_id,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": completion.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 2,
        "zfabric.worker": "w",
    }
    for span in (attempt, server):
        # One name for a request at client, controller and worker.
        assert said(span)["zfabric.request.id"] == stream.request_id
        assert said(span)["zfabric.worker"] == "w"
    assert said(attempt)["zfabric.dispatch.reason"] == "chosen"
    assert said(attempt)["zfabric.outcome"] == "completed"
    assert said(server)["gen_ai.usage.output_tokens"] == 2
    assert said(server)["gen_ai.response.finish_reasons"] == ("stop",)
    assert all(span.status.status_code is StatusCode.UNSET for span in recorded.spans())
    # What the backend passes on, and what its own instrumentation takes for current, is the engine's span.
    (headers,) = backend.headers
    assert headers["traceparent"].split("-")[2] == f"{id_of(engine):016x}"
    assert backend.current == [id_of(engine)]


async def test_a_blocking_client_takes_the_span_of_the_thread_that_calls(ipc: str) -> None:
    recorded = Recorded()
    async with fabric(ipc) as made:
        await made.add_worker("w")

        def work() -> None:
            with Client(made.endpoint, tracing=recorded.client) as client:
                tracer = recorded.client.get_tracer("program")
                with tracer.start_as_current_span("handler"):
                    client.generate("echo", "one")
                    client.stream("echo", "one").collect()
                    client.embed("echo", ["one"])
                    dict(client.generate_many("echo", ["a", "b", "c"], concurrency=1))

        await asyncio.to_thread(work)
    top, spans = recorded.one("client", "handler"), [*recorded.of("client", "text"), *recorded.of("client", "embed")]
    assert len(spans) == 6
    assert {parent_of(span) for span in spans} == {id_of(top)}


async def test_a_migration_stays_one_trace(ipc: str, run_directory: Path) -> None:
    """The first worker is killed in mid-answer; the second goes on with it."""
    recorded = Recorded()
    async with processes(run_directory) as children, fabric(ipc, traces=recorded.controller()) as made:
        first = await Process.start(
            WORKER, "--endpoint", ipc, "--name", "first", "--tokens-per-second", "200", directory=run_directory
        )
        children.append(first)
        await first.ready()
        async with AsyncClient(made.endpoint, tracing=recorded.client) as client:
            stream = client.stream("echo", "a b c", temperature=0, max_new_tokens=64)
            await anext(stream)
            await made.add_worker("second", traces=recorded.worker("second"))
            first.kill()
            completion = await stream
            assert len(completion.token_ids) == 64
        await ended(made)
    mine = recorded.one("client")
    lost, went_on = recorded.of("controller", "attempt")
    assert {parent_of(lost), parent_of(went_on)} == {id_of(mine)}
    check_tree(mine, went_on, recorded.one("second", "text_completion"), recorded.one("second", "engine"))
    assert events_of(mine) == ["zfabric.first_chunk", "zfabric.failover", "zfabric.first_chunk"]
    assert said(mine)["zfabric.worker"] == "second"
    assert said(mine)["gen_ai.usage.output_tokens"] == 64
    assert mine.status.status_code is StatusCode.UNSET
    assert (said(lost)["zfabric.attempt"], said(lost)["zfabric.worker"]) == (0, "first")
    assert said(lost)["error.type"] == "WorkerLostError"
    assert events_of(lost) == ["zfabric.worker_lost"]
    assert lost.status.status_code is StatusCode.ERROR
    assert events_of(went_on) == ["zfabric.failover", "zfabric.resumption"]
    assert (said(went_on)["zfabric.attempt"], said(went_on)["zfabric.worker"]) == (1, "second")


async def test_a_cancel_is_told_by_all(ipc: str) -> None:
    recorded, backend = Recorded(), Told()
    async with fabric(ipc, traces=recorded.controller()) as made:
        await made.add_worker("w", backend, traces=recorded.worker("w"))
        async with AsyncClient(made.endpoint, tracing=recorded.client) as client:
            stream = client.stream("m", "x")
            await backend.begun.wait()
            stream.cancel()
            with pytest.raises(RequestCancelledError):
                await stream
            await ended(made)
    for span in (recorded.one("client"), recorded.one("controller", "attempt"), recorded.one("w", "engine")):
        assert said(span)["error.type"] == "RequestCancelledError", span.name
        assert said(span)["zfabric.error.code"] == RequestCancelledError.code
    assert "zfabric.cancelled" in events_of(recorded.one("controller", "attempt"))


async def test_an_error_is_told_with_its_code(ipc: str) -> None:
    recorded, backend = Recorded(), Told()
    async with fabric(ipc, traces=recorded.controller()) as made:
        await made.add_worker("w", backend, traces=recorded.worker("w"))
        async with AsyncClient(made.endpoint, tracing=recorded.client) as client:
            with pytest.raises(BackendError):
                await client.generate("m", "fail")
            with pytest.raises(UnknownModelError):
                await client.generate("nobody-serves-this", "x")
            await ended(made)
    failed, unknown = recorded.of("client")
    assert (said(failed)["error.type"], failed.status.description) == ("BackendError", "the engine coughed")
    assert said(unknown)["error.type"] == "UnknownModelError"
    broken, refused = recorded.of("controller", "attempt")
    assert [said(span)["zfabric.outcome"] for span in (broken, refused)] == ["failed", "rejected"]
    assert said(refused)["zfabric.error.code"] == UnknownModelError.code
    assert parent_of(refused) == id_of(unknown)
    assert recorded.one("w", "text_completion").status.description == "the engine coughed"


async def test_what_is_not_sampled_is_passed_on_and_not_recorded(ipc: str) -> None:
    recorded, backend = Recorded(ALWAYS_OFF), Told()
    backend.gate.set()
    async with fabric(ipc, traces=recorded.controller()) as made:
        await made.add_worker("w", backend, traces=recorded.worker("w"))
        async with AsyncClient(made.endpoint, tracing=recorded.client) as client:
            await client.generate("m", "x")
        await ended(made)
    assert not recorded.spans()
    (headers,) = backend.headers
    context = parse_headers(headers)
    assert context is not None
    assert not context.sampled


async def test_without_any_tracing_a_context_reaches_the_backend_as_it_came(ipc: str) -> None:
    backend = Told()
    backend.gate.set()
    async with fabric(ipc) as made:
        await made.add_worker("w", backend)
        async with AsyncClient(made.endpoint) as client:
            await client.generate("m", "x")
            with below(ABOVE):
                await client.generate("m", "x")
            with below({"traceparent": "00-nonsense", "tracestate": "a=b"}):
                await client.generate("m", "x")
    assert backend.headers == [{}, ABOVE, {}]


async def test_somebody_elses_headers_are_above_where_no_span_is_current(ipc: str) -> None:
    recorded = Recorded()
    async with fabric(ipc) as made:
        await made.add_worker("w")
        async with AsyncClient(made.endpoint, tracing=recorded.client) as client:
            with below(ABOVE):
                await client.embed("echo", ["x"])
    span = recorded.one("client", "embeddings echo")
    assert parent_of(span) == 0xB7AD6B7169203331
    assert span.context is not None
    assert span.context.trace_state.to_header() == "vendor=a"


async def test_a_wait_for_a_reader_is_told(ipc: str) -> None:
    """A stream whose window is used up waits, and its span says so."""
    recorded = Recorded()
    async with fabric(ipc, traces=recorded.controller()) as made:
        service = await made.add_worker("w", traces=recorded.worker("w"))
        async with AsyncClient(made.endpoint, tracing=recorded.client) as client:
            stream = client.stream("echo", "a b c", max_new_tokens=4_000)
            while not service.figures.credit_waiting:
                await asyncio.sleep(0)
            await stream
        await ended(made)
    assert "zfabric.credit_wait" in events_of(recorded.one("w", "text_completion"))
    assert service.figures.credit_waits.count == service.figures.credit_waiting >= 1


async def test_a_backends_trouble_names_request_and_trace_in_the_log(ipc: str) -> None:
    logged: list[tuple[str, dict[str, object]]] = []
    async with fabric(ipc) as made:
        await made.add_worker("w", Told(), log=lambda event, **fields: logged.append((event, fields)))
        async with AsyncClient(made.endpoint) as client:
            with below(ABOVE):
                traced = client.stream("m", "break")
            plain = client.stream("m", "break")
            for stream in (traced, plain):
                with pytest.raises(BackendError):
                    await stream
    told = [fields for event, fields in logged if event == "backend_error"]
    assert [fields["request"] for fields in told] == [traced.request_id, plain.request_id]
    assert [fields.get("trace") for fields in told] == ["0af7651916cd43dd8448eb211c80319c", None]


@pytest.mark.parametrize("wrong", ["yes", 1, object()])
def test_what_is_no_provider_is_named(wrong: object) -> None:
    with pytest.raises(ConfigurationError, match="TracerProvider"):
        AsyncClient("ipc:///nowhere", tracing=wrong)  # type: ignore[arg-type]
