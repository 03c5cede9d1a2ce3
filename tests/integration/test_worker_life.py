"""A worker's life: drains that are asked twice, announcements that cannot be, engines that hang beside others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import Process, fabric, processes, words
from tests.integration.bare_worker import abort, bare_worker, dispatch
from zfabric import (
    AsyncClient,
    BaseModelWorker,
    Delta,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    StepwiseModelWorker,
)
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import (
    ConfigurationError,
    EngineStalledError,
    NoWorkerError,
    UnknownModelError,
    WorkerDrainingError,
    WorkerLostError,
)
from zfabric.wire import codec
from zfabric.wire.messages import Drain
from zfabric.wire.payloads import OperateRequest
from zfabric.worker.base import EngineLoad
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService

WORKER = "zfabric.cli.worker"


class Gated(BaseModelWorker):
    """Answers when its gate opens."""

    parameters = frozenset({"max_new_tokens", "temperature"})

    def __init__(self, *names: str) -> None:
        self.names = names or ("m",)
        self.gate = asyncio.Event()
        self.begun = 0

    async def load(self) -> list[ModelInfo]:
        return self.infos(*self.names)

    def infos(self, *names: str) -> list[ModelInfo]:
        return [ModelInfo(name=name, capabilities=["generate"]) for name in names]

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.begun += 1
        await self.gate.wait()
        yield Delta(text="at last", token_ids=[1], finish_reason="stop")


# ── drain ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_drain_that_is_asked_again_joins_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Gated()
    async with bare_worker(monkeypatch, backend, drained=False) as worker:
        worker.say(dispatch(1))
        await worker.until(lambda: backend.begun)
        # An operator's query, which is asked again after a reconnect, and then a signal.
        worker.say(codec.pack(Drain(60_000)), codec.pack(Drain(60_000)))
        drains = [asyncio.create_task(worker.service.drain(limit)) for limit in (None, 50_000)]
        await worker.beats(len(worker.loads) + 3)
        assert not worker.ends
        assert not any(drain.done() for drain in drains)
        # Who no longer waits for it does not stop it.
        drains[1].cancel()
        worker.say(dispatch(2))
        assert worker.ends[2][0].code == WorkerDrainingError.code
        backend.gate.set()
        await drains[0]
        assert worker.ends[1][0].code == 0
        assert worker.events.count("draining") == 1
        await worker.service.drain()


@pytest.mark.parametrize("limits_ms", [(60_000, 30), (30, 60_000)])
async def test_the_nearer_of_two_limits_holds(monkeypatch: pytest.MonkeyPatch, limits_ms: tuple[int, int]) -> None:
    backend = Gated()
    async with bare_worker(monkeypatch, backend, drained=False) as worker:
        worker.say(dispatch(1))
        await worker.until(lambda: backend.begun)
        first, second = (asyncio.create_task(worker.service.drain(limit_ms)) for limit_ms in limits_ms)
        async with asyncio.timeout(20):
            await asyncio.gather(first, second)
        assert (await worker.end_of(1))[0].code == WorkerDrainingError.code
        assert worker.events.count("drain_limit_reached") == 1


async def test_a_drain_waits_for_what_still_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = asyncio.Event()

    class Slow(Gated):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
            self.begun += 1
            try:
                await self.gate.wait()
            finally:
                await stopped.wait()
            yield Delta()

    backend = Slow()
    async with bare_worker(monkeypatch, backend, drained=False) as worker:
        worker.say(dispatch(1))
        await worker.until(lambda: backend.begun)
        worker.say(abort(1))
        drain = asyncio.create_task(worker.service.drain(60_000))
        await worker.beats(len(worker.loads) + 3)
        assert not drain.done()
        stopped.set()
        await drain
        assert 1 in worker.ends


async def test_a_drain_before_the_start_ends_it(ipc: str) -> None:
    service = WorkerService([Gated()], WorkerConfig(endpoint=ipc, name="w"))
    await service.drain()
    async with asyncio.timeout(10):
        await service.run()


async def test_a_drain_asked_twice_through_the_fabric(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        service = await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=200)))
        stream = client.stream("echo", "a b", max_new_tokens=100, temperature=0)
        await anext(stream)
        await client.drain_worker("w0")
        await client.drain_worker("w0")
        drain = asyncio.create_task(service.drain())
        async for _ in stream:
            pass
        assert stream.text == words("a b", 100)
        await drain
        await made.tasks["w0"]


# ── announcements ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_cannot_be_announced_is_refused_and_what_was_served_still_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = Gated("one", "other"), Gated("two")
    one.gate.set()
    two.gate.set()
    refused: list[Any] = [
        one.infos("one", "two"),
        one.infos("one", "one"),
        [ModelInfo(name="one", aliases=["two"])],
        one.infos("x" * 300),
        one.infos("\ud800"),
        [ModelInfo(name="one", details={"x": object()})],  # type: ignore[dict-item]
        ["one"],
        5,
    ]
    async with bare_worker(monkeypatch, one, two) as worker:
        for models in refused:
            with pytest.raises(ConfigurationError):
                one.steps.models_changed(models)
        assert worker.events.count("announcement_refused") == len(refused)
        assert len(worker.hellos) == 1
        for number, model in enumerate(["one", "other", "two"]):
            worker.say(dispatch(number, model=model))
            assert (await worker.end_of(number))[0].code == 0
        # Nothing at all is an announcement as well, and another backend may have the names then.
        one.steps.models_changed([])
        two.steps.models_changed(two.infos("two", "one"))
        assert [[(info.name, info.engine) for info in hello.models] for hello in worker.hellos[1:]] == [
            [("two", 1)],
            [("two", 1), ("one", 1)],
        ]
        with pytest.raises(ConfigurationError):
            one.steps.models_changed(one.infos("one"))
        worker.say(dispatch(10, model="one"), dispatch(11, model="other"))
        assert (await worker.end_of(10))[0].code == 0
        assert two.begun == 2
        assert (await worker.end_of(11))[0].code == UnknownModelError.code


async def test_a_reload_that_cannot_be_announced_is_logged_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reloading(Gated):
        async def reload(self) -> None:
            self.steps.models_changed(self.infos("two"))

    one, two = Reloading("one"), Gated("two")
    one.gate.set()
    async with bare_worker(monkeypatch, one, two) as worker:
        await worker.service.reload()
        assert worker.events[-3:] == ["announcement_refused", "reload_failed", "reloaded"]
        worker.say(dispatch(1, model="one"))
        assert (await worker.end_of(1))[0].code == 0


async def test_a_worker_that_serves_nothing_any_more_gets_nothing_more(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        backend = Gated("gone")
        await made.add_worker("w0", backend, EchoWorker())
        running = asyncio.create_task(client.generate("gone", "x"))
        while not backend.begun:
            await asyncio.sleep(0.005)
        backend.steps.models_changed([])
        while any(model.name == "gone" and model.workers for model in await client.models()):
            await asyncio.sleep(0.005)
        assert (await client.generate("echo", "a", max_new_tokens=1)).text == "a "
        with contextlib.suppress(NoWorkerError, UnknownModelError, TimeoutError):
            async with asyncio.timeout(0.1):
                await client.generate("gone", "x")
        assert backend.begun == 1
        # What runs, runs on; and it is served again when the backend says so.
        backend.gate.set()
        assert (await running).text == "at last"
        backend.steps.models_changed(backend.infos("gone"))
        async with asyncio.timeout(10):
            assert (await client.generate("gone", "x")).text == "at last"


@pytest.mark.parametrize("name", ["Unannounceable", "TooMany", "Twice"])
async def test_a_worker_that_cannot_say_hello_says_why_and_exits(ipc: str, run_directory: Path, name: str) -> None:
    """Without a controller: it is nobody's word but the worker's own."""
    async with processes(run_directory) as children:
        backend = f"tests.cli.backends:{name}"
        worker = await Process.start(WORKER, "--endpoint", ipc, "--backend", backend, directory=run_directory)
        children.append(worker)
        assert await worker.ended(60) == 2
        log = worker.log.read_text()
        assert "Traceback" not in log
        assert "announced" in log or "named" in log


# ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Hanging(StepwiseModelWorker):
    """Steps once, and then no more, while its process goes on."""

    parameters = frozenset({"max_new_tokens", "temperature"})

    async def load(self) -> ModelInfo:
        return ModelInfo(name="hanging", capabilities=["generate"])

    def begin(self, request: GenerateRequest) -> None:
        self.steps.emit([(request.request_id, Delta(text="x", token_ids=[1]))])

    def abort(self, request_id: str) -> None:
        """Nothing runs."""

    def load_report(self) -> EngineLoad:
        return EngineLoad(progress=1)


async def test_a_slow_first_token_is_no_hung_engine_and_a_hung_one_does_not_hide_behind_another(ipc: str) -> None:
    async with fabric(ipc, beat_ms=20, stall_ms=200) as made, AsyncClient(made.endpoint) as client:
        slow = Gated("slow")
        await made.add_worker("w0", slow, Hanging(), EchoWorker(EchoOptions(tokens_per_second=100)))
        waiting = asyncio.create_task(client.generate("slow", "x"))
        busy = asyncio.create_task(client.generate("echo", "a b", max_new_tokens=100, temperature=0))
        hung = client.stream("hanging", "x", resume="never")
        await anext(hung)
        with pytest.raises(EngineStalledError):
            async for _ in hung:
                pass
        assert (await busy).text == words("a b", 100)
        assert not waiting.done()
        slow.gate.set()
        assert (await waiting).text == "at last"
        assert slow.begun == 1


async def test_echo_by_a_slow_schedule_is_not_hung(ipc: str) -> None:
    async with fabric(ipc, beat_ms=20, stall_ms=100) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", EchoWorker(EchoOptions(first_token_ms=600)))
        assert (await client.generate("echo", "a", max_new_tokens=1)).text == "a "
        assert client.figures()["failovers"] == 0


async def test_an_engine_that_dies_with_whatever_fails_over(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, other = Hanging(), Gated()
    async with bare_worker(monkeypatch, backend, other, drained=False) as worker:
        worker.say(dispatch(1, model="hanging"), dispatch(2))
        died: Any = ValueError("half a \ud800")
        backend.steps.engine_died(died)
        assert (await worker.end_of(1))[0].code == WorkerLostError.code
        # Told before: whoever submits it anew at once must not find this worker once more.
        assert worker.loads[-1].draining
        # The process ends: what another engine has is handed back.
        assert (await worker.end_of(2))[0].code == WorkerDrainingError.code


async def test_stop_and_start_a_hundred_times_through_the_fabric(ipc: str) -> None:
    """A request that is cancelled in the turn in which it was made."""
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        gated, echo = Gated(), EchoWorker(EchoOptions(first_token_ms=10_000))
        service = await made.add_worker("w0", gated, echo)
        await client.status()
        for model in ("m", "echo"):
            for _ in range(50):
                client.stream(model, "x").cancel()
        while len(service._runs) or service._sessions.busy:
            await asyncio.sleep(0.005)
        # Not one of them is left behind on the way either.
        while (await client.status()).in_flight:
            await asyncio.sleep(0.005)
        assert not echo._streams


async def test_settings_that_are_no_numbers_are_refused() -> None:
    for speed in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ConfigurationError, match="speed"):
            WorkerConfig(speed=speed)
    with pytest.raises(ConfigurationError, match="drain_ms"):
        WorkerConfig(drain_ms=-1)


async def test_an_operation_is_taken_while_a_worker_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Operated(Gated):
        async def operate(self, request: OperateRequest) -> Any:
            return request.call

    backend = Operated()
    async with bare_worker(monkeypatch, backend, drained=False) as worker:
        worker.say(dispatch(1, GenerateRequest(prompt="x", sampling=SamplingParams())))
        await worker.until(lambda: backend.begun)
        drain = asyncio.create_task(worker.service.drain(60_000))
        await asyncio.sleep(0)
        worker.say(dispatch(2, OperateRequest(call="look")))
        assert codec.unpack_result((await worker.end_of(2))[1].result, str) == "look"
        backend.gate.set()
        await drain


async def test_a_log_that_breaks_stops_nothing(ipc: str) -> None:
    """Whoever read it is gone, as the reader of a pipe may be."""

    def broken(event: str, **fields: object) -> None:
        raise BrokenPipeError

    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        service = WorkerService([EchoWorker()], WorkerConfig(endpoint=made.endpoint, name="w0"), log=broken)
        running = asyncio.create_task(service.run())
        async with asyncio.timeout(20):
            while not await client.workers():
                await asyncio.sleep(0.005)
            assert (await client.generate("echo", "a", max_new_tokens=1)).text == "a "
            await service.drain()
            await running
