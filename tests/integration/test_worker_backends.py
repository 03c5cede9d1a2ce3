"""Whatever a backend does wrong is one request's error, and whatever it takes to stop keeps one slot."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from tests.integration.bare_worker import abort, bare_worker, dispatch
from zfabric import (
    BaseModelWorker,
    Delta,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    StepwiseModelWorker,
    Usage,
)
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import (
    BackendError,
    ContextOverflowError,
    ParameterRangeError,
    RequestCancelledError,
    RequestError,
    UnknownModelError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.wire import codec
from zfabric.wire.payloads import CountRequest, OperateRequest, TextRequest
from zfabric.wire.sampling import WHAT_THE_CONTEXT_LEAVES, SamplingOptions
from zfabric.worker import runs
from zfabric.worker.base import EngineLoad

WHOLE = SamplingOptions(max_new_tokens=WHAT_THE_CONTEXT_LEAVES)


class Backend(BaseModelWorker):
    """Behaves as its prompt says: a method's name."""

    parameters = frozenset({"max_new_tokens", "n", "temperature", "seed"})

    def __init__(self, name: str = "m") -> None:
        self.name = name
        self.closed = False
        self.release = asyncio.Event()
        self.running: set[str] = set()
        self.most = 0
        self.seen: list[SamplingParams] = []

    async def load(self) -> ModelInfo:
        return ModelInfo(name=self.name, capabilities=["generate", "embed"])

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.seen.append(request.sampling)
        made: AsyncIterator[Delta] = getattr(self, request.plain_text())(request)
        return made

    async def x(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        for number in range(3):
            await asyncio.sleep(0)
            yield Delta(text=f"{number} ", token_ids=[number])

    async def for_ever(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.running.add(request.request_id)
        self.most = max(self.most, len(self.running))
        try:
            while True:
                yield Delta(text="x", token_ids=[1])
                await asyncio.sleep(0)
        finally:
            self.running.discard(request.request_id)

    async def never_awaits(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.running.add(request.request_id)
        try:
            while True:
                yield Delta(text="x", token_ids=[1])
        finally:
            self.running.discard(request.request_id)

    async def slow_to_stop(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.running.add(request.request_id)
        self.most = max(self.most, len(self.running))
        try:
            yield Delta(text="x", token_ids=[1])
            await asyncio.Event().wait()
        finally:
            await self.release.wait()
            self.running.discard(request.request_id)

    async def never_stops(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta(text="x", token_ids=[1])
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                continue

    async def goes_on_after_its_end(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.running.add(request.request_id)
        try:
            yield Delta(text="end", token_ids=[1], finish_reason="stop", usage=Usage(1, 1))
            while True:
                await asyncio.sleep(0)
                yield Delta(text="more", token_ids=[2])
        finally:
            self.running.discard(request.request_id)

    async def ends_without_a_word(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        for index in range(request.sampling.n):
            yield Delta(text=f"{index}", token_ids=[1], index=index)

    async def yields_nothing(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.model == "no such":
            yield Delta()

    async def raises_at_its_close(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        try:
            yield Delta(text="end", token_ids=[1], finish_reason="stop", usage=Usage(1, 1))
            yield Delta(text="more")
        finally:
            raise OSError("the file is gone")

    async def yields(self, what: Any) -> AsyncIterator[Delta]:
        yield Delta(text="good ", token_ids=[1])
        yield what
        yield Delta(text="more")

    def a_text(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        return self.yields("a text")

    def half_a_character(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        return self.yields(Delta(text="\ud83d", token_ids=[2]))

    def another_choice(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        return self.yields(Delta(text="x", index=3))

    def a_negative_choice(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        return self.yields(Delta(text="x", index=-1))

    def no_tokens(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        unsound: Any = Delta
        return self.yields(unsound(text="x", token_ids=None))

    async def cancels_itself(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta(text="good ", token_ids=[1])
        raise asyncio.CancelledError

    async def raises(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        yield Delta(text="good ", token_ids=[1])
        raise ValueError("half a \ud83d")

    def raises_at_once(self, _: GenerateRequest) -> AsyncIterator[Delta]:
        raise KeyError("m")

    def is_a_list(self, _: GenerateRequest) -> Any:
        return [Delta(text="x")]

    async def is_a_coroutine(self, _: GenerateRequest) -> Any:
        return [Delta(text="x")]

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        text = str(request.inputs[0])
        if text == "wait":
            await asyncio.Event().wait()
        if text == "cancelled":
            raise asyncio.CancelledError
        results: dict[str, Any] = {
            "array": np.zeros((1, 2)),
            "short": EmbedResult(rows=1, dimensions=2, data=b"1234"),
            "wide": EmbedResult(rows=1, dimensions=2, data=np.zeros(2).tobytes()),
            "good": EmbedResult(rows=np.int64(1), dimensions=2, data=memoryview(np.zeros(2, np.float32))),  # type: ignore[arg-type]
        }
        return results[text]  # type: ignore[no-any-return]

    async def close(self) -> None:
        self.closed = True


BROKEN = [
    "a_text", "half_a_character", "another_choice", "a_negative_choice", "no_tokens", "cancels_itself", "raises",
    "raises_at_once", "is_a_list", "is_a_coroutine", "no_such_method",
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", BROKEN)
async def test_a_request_that_a_backend_breaks_ends_alone(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async with bare_worker(monkeypatch, Backend()) as worker:
        worker.say(
            dispatch(1, GenerateRequest(prompt="for_ever")), dispatch(2, GenerateRequest(prompt=how)), dispatch(3)
        )
        end, outcome = await worker.end_of(2)
        assert end.code == BackendError.code
        assert outcome.message
        assert "backend_error" in worker.events
        assert (await worker.end_of(3))[0].code == 0
        assert worker.text(3) == "0 1 2 "
        assert worker.text(2) in ("", "good ")
        said = len(worker.chunks)
        await worker.until(lambda: len(worker.chunks) > said + 3)
        worker.say(abort(1))
        await worker.end_of(1)
        worker.at_rest()
        gc.collect()


async def test_an_end_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    async with bare_worker(monkeypatch, backend) as worker:
        names = ["goes_on_after_its_end", "yields_nothing", "raises_at_its_close", "ends_without_a_word"]
        for number, name in enumerate(names):
            worker.say(dispatch(number, GenerateRequest(prompt=name)))
        two = GenerateRequest(prompt="ends_without_a_word", sampling=SamplingParams(n=2))
        worker.say(dispatch(9, two))
        for number in (*range(len(names)), 9):
            assert (await worker.end_of(number))[0].code == 0
        await worker.until(lambda: len(worker.service._runs) == 0)
        assert [worker.text(number) for number in range(len(names))] == ["end", "", "end", "0"]
        assert not backend.running
        reasons = {c.index: c.extra.finish_reason for c in worker.chunks if c.request == 9 and c.extra}
        assert reasons == {0: "stop", 1: "stop"}
        assert worker.ends[9][1].usage == Usage(0, 2, estimated=True)
        # What broke after the end is told to the operator, not to the reader.
        assert [fields["error"] for event, fields in worker.log if event == "backend_error"] == [
            "OSError: the file is gone"
        ]
        worker.at_rest()


@pytest.mark.parametrize(
    ("text", "good"), [("array", False), ("short", False), ("wide", False), ("cancelled", False), ("good", True)]
)
async def test_vectors_are_what_they_say(monkeypatch: pytest.MonkeyPatch, text: str, good: bool) -> None:
    async with bare_worker(monkeypatch, Backend()) as worker:
        worker.say(dispatch(1, EmbedRequest(inputs=[text])))
        end, outcome = await worker.end_of(1)
        assert end.code == (0 if good else BackendError.code)
        if good:
            assert codec.unpack_result(outcome.result, EmbedResult) == EmbedResult(rows=1, dimensions=2, data=bytes(8))
        await worker.until(lambda: len(worker.service._runs) == 0)


# ── begin and stop ──────────────────────────────────────────────────────────────────────────────────────────────────


class Counting(EchoWorker):
    """Counts what is begun and aborted."""

    def __init__(self) -> None:
        super().__init__(EchoOptions(model_names=("m",), first_token_ms=10_000))
        self.calls: list[str] = []

    def begin(self, request: GenerateRequest) -> None:
        self.calls.append("begin")
        super().begin(request)

    def abort(self, request_id: str) -> None:
        self.calls.append("abort")
        super().abort(request_id)


REQUESTS: list[Callable[[], Any]] = [
    lambda: GenerateRequest(prompt="for_ever"),
    lambda: EmbedRequest(inputs=["wait"]),
    lambda: OperateRequest(call="wait"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", REQUESTS, ids=["generate", "embed", "operate"])
async def test_what_is_stopped_before_it_began_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    backend = Backend()
    async with bare_worker(monkeypatch, backend) as worker:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for number in range(50):
                worker.say(dispatch(number, make()), abort(number))
            for number in range(50):
                assert (await worker.end_of(number))[0].code == RequestCancelledError.code
            gc.collect()
        assert not backend.running
        worker.at_rest()


async def test_a_step_wise_engine_is_told_of_each_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Counting()
    async with bare_worker(monkeypatch, engine) as worker:
        for number in range(50):
            worker.say(dispatch(number), abort(number))
            assert worker.ends[number][0].code == RequestCancelledError.code
        assert engine.calls == ["begin", "abort"] * 50
        assert not engine._streams
        worker.at_rest()


async def test_a_slot_is_free_when_the_generator_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    async with bare_worker(monkeypatch, backend) as worker:
        worker.say(dispatch(1, GenerateRequest(prompt="slow_to_stop")))
        await worker.until(lambda: worker.chunks)
        worker.say(abort(1))
        await worker.beats(len(worker.loads) + 3)
        # It beats on, says that the slot is taken, and has not said that the request has stopped.
        assert (1 in worker.ends, worker.loads[-1].running) == (False, 1)
        backend.release.set()
        await worker.end_of(1)
        assert not backend.running
        worker.at_rest()


async def test_a_generator_that_awaits_nothing_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are served beside it, the worker beats, and it can be stopped."""
    backend = Backend()
    async with bare_worker(monkeypatch, backend) as worker:
        worker.say(dispatch(1, GenerateRequest(prompt="never_awaits", sampling=WHOLE.resolved({}))))
        await worker.until(lambda: worker.chunks)
        await worker.beats(len(worker.loads) + 1)
        worker.say(dispatch(2))
        assert (await worker.end_of(2))[0].code == 0
        worker.say(abort(1))
        assert (await worker.end_of(1))[0].code == RequestCancelledError.code
        assert not backend.running
        worker.at_rest()


async def test_a_generator_that_does_not_stop_is_named_and_keeps_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "STOP_MS", 50)
    backend = Backend()
    async with bare_worker(monkeypatch, backend) as worker:
        worker.say(dispatch(1, GenerateRequest(prompt="never_stops")))
        await worker.until(lambda: worker.chunks)
        worker.say(abort(1))
        assert (await worker.end_of(1))[0].code == RequestCancelledError.code
        (late,) = [fields for event, fields in worker.log if event == "stop_limit_reached"]
        assert late["backend"] == "Backend"
        # The same attempt again finds its former self still there, and is refused.
        worker.ends.clear()
        worker.say(dispatch(1, GenerateRequest(prompt="x")))
        assert (await worker.end_of(1))[0].code == BackendError.code
        backend.release.set()
        await worker.until(lambda: len(worker.service._runs) == 0)
        assert len(worker.ends) == 1


class Stubborn(Counting):
    """Whatever it is asked to stop, it raises."""

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        raise RuntimeError("no such request")

    async def close(self) -> None:
        await super().close()
        raise RuntimeError("cannot close")


async def test_an_abort_or_a_close_that_raises_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Backend("other")
    async with bare_worker(monkeypatch, Stubborn(), other) as worker:
        worker.say(dispatch(1), abort(1))
        assert worker.ends[1][0].code == RequestCancelledError.code
        assert "abort_failed" in worker.events
    assert worker.events[-1] == "close_failed"
    assert other.closed


class Threaded(StepwiseModelWorker):
    """Steps in a thread of its own."""

    parameters = frozenset({"max_new_tokens"})

    async def load(self) -> ModelInfo:
        return ModelInfo(name="m", capabilities=["generate"])

    def begin(self, request: GenerateRequest) -> None:
        threading.Thread(target=self.step, args=(request.request_id, request.plain_text()), daemon=True).start()

    def step(self, request_id: str, prompt: str) -> None:
        for number in range(100):
            self.steps.emit_threadsafe((name, Delta(text=f"{number} ", token_ids=[number])) for name in [request_id])
        if prompt == "fails":
            self.steps.fail_threadsafe(request_id, BackendError("as asked"))
        else:
            self.steps.emit_threadsafe([(request_id, Delta(finish_reason="stop", usage=Usage(1, 100)))])

    def abort(self, request_id: str) -> None:
        """Nothing waits long."""


async def test_an_engine_may_step_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Threaded()
    async with bare_worker(monkeypatch, backend) as worker:
        worker.say(dispatch(1), dispatch(2, GenerateRequest(prompt="fails")))
        assert (await worker.end_of(1))[0].code == 0
        assert (await worker.end_of(2))[0].code == BackendError.code
        assert worker.text(1) == worker.text(2) == "".join(f"{number} " for number in range(100))
        worker.at_rest()


def test_a_thread_that_outlives_its_worker_is_not_hurt() -> None:
    import zfabric.testing

    backend = Threaded()
    with zfabric.testing.run_backend(backend) as client:
        assert client.generate("m", "x").finish_reason == "stop"
    backend.step("nobody", "x")
    backend.step("nobody", "fails")


# ── who gets what ───────────────────────────────────────────────────────────────────────────────────────────────────


class Operated(Backend):
    """Has calls."""

    async def operate(self, request: OperateRequest) -> Any:
        return self.name


async def test_a_call_goes_to_the_backend_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bare_worker(monkeypatch, Operated("one"), Operated("two")) as worker:
        for number, model in enumerate(["one", "two", "", "three"]):
            worker.say(dispatch(number, OperateRequest(call="who"), model=model))
        assert codec.unpack_result((await worker.end_of(0))[1].result, str) == "one"
        assert codec.unpack_result((await worker.end_of(1))[1].result, str) == "two"
        end, outcome = await worker.end_of(2)
        assert end.code == RequestError.code
        assert "one, two" in outcome.message
        assert (await worker.end_of(3))[0].code == UnknownModelError.code


async def test_a_call_without_a_model_goes_to_the_only_backend_that_has_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bare_worker(monkeypatch, Backend("one"), Operated("two")) as worker:
        worker.say(dispatch(1, OperateRequest(call="who"), model=""), dispatch(2, model=""))
        assert codec.unpack_result((await worker.end_of(1))[1].result, str) == "two"
        # Text from one of several models is a question that has no answer.
        assert (await worker.end_of(2))[0].code == RequestError.code


async def test_the_client_s_seed_is_drawn_by_where_the_model_honours_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, deaf = Backend(), Backend("deaf")
    deaf.parameters = frozenset({"temperature"})  # type: ignore[misc]
    cases: list[tuple[str, dict[str, Any], int | None, int | None, bool]] = [
        ("m", {}, 5, 5, True),
        ("m", {"seed": 3}, 5, 3, True),
        ("m", {"temperature": 0.0}, 5, None, True),
        ("m", {}, None, None, False),
        ("m", {"n": 2}, 5, 5, False),
        ("deaf", {}, 5, None, False),
    ]
    async with bare_worker(monkeypatch, backend, deaf) as worker:
        for number, (model, sampling, drawn, expected, exact) in enumerate(cases):
            request = GenerateRequest(
                prompt="ends_without_a_word", sampling=SamplingParams(**sampling), drawn_seed=drawn
            )
            worker.say(dispatch(number, request, model=model))
            await worker.end_of(number)
            assert (deaf if model == "deaf" else backend).seen[-1].seed == expected
            first = next(chunk for chunk in worker.chunks if chunk.request == number)
            assert first.extra is not None
            assert first.extra.exact is exact
        # To set one where it is not honoured is still refused.
        request = GenerateRequest(prompt="x", sampling=SamplingParams(seed=1))
        worker.say(dispatch(99, request, model="deaf"))
        assert (await worker.end_of(99))[0].code == UnsupportedParameterError.code
        worker.say(dispatch(98, GenerateRequest(prompt="x", drawn_seed=2**64 - 1)))
        assert (await worker.end_of(98))[0].code == ParameterRangeError.code


# ── load reports ────────────────────────────────────────────────────────────────────────────────────────────────────


class Reporting(Backend):
    """Tells what it is told to."""

    report: Any = EngineLoad(progress=1)

    def load_report(self) -> EngineLoad:
        if isinstance(self.report, Exception):
            raise self.report
        told: EngineLoad = self.report
        return told


async def test_a_beat_leaves_whatever_an_engine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    odd, plain = Reporting(), Reporting("plain")
    plain.report = EngineLoad(gauges={"fine": 1})
    load: Any = EngineLoad
    many = {f"g{number}": number for number in range(1_000)}
    reports: list[tuple[Any, dict[str, float], int | None]] = [
        (load(progress=np.int64(7), waiting=np.int32(2), gauges={"a": np.float32(0.5), "b": True}), {"a": 0.5, "b": 1.0}, 7),
        (load(progress=8, gauges={"a": float("nan"), "b": float("inf"), "c": 1}), {"c": 1.0}, 8),
        (load(progress=9, gauges={"x" * 400: 1, "\ud800": 2, "": 3, 5: 4, "d": "five"}), {"x" * 256: 1.0}, 9),
        (load(progress=10, waiting=-5, kv_blocks_free=2**70, slots=10**9, gauges={}), {}, 10),
        (OSError("no counters"), {}, 10),
        (None, {}, 10),
        (load(progress="many"), {}, 10),
        (load(progress=11, gauges=many), dict(list(many.items())[:64]), 11),
        (load(), {}, None),
    ]  # fmt: skip
    async with bare_worker(monkeypatch, odd, plain) as worker:
        for report, gauges, progress in reports:
            odd.report = report
            seen = len(worker.loads)
            await worker.beats(seen + 2)
            beat = worker.loads[-1]
            assert beat.gauges == dict(list({**gauges, "fine": 1.0}.items())[:64])
            assert beat.engines == [progress, None]
        # Each fault is told once, however many beats it lasts.
        assert worker.events.count("bad_load_report") == 6


# ── prompts without end ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_echo_takes_what_it_can_split_and_keeps_stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bare_worker(monkeypatch, EchoWorker(EchoOptions(model_names=("m",)))) as worker:
        running = TextRequest(prompt="a b", sampling=WHOLE)
        huge = [
            GenerateRequest(prompt="x " * 8_000_000),
            GenerateRequest(prompt_token_ids=[1] * 1_000_000),
            GenerateRequest(messages=[{"role": "user", "content": "x " * 8_000_000}]),
        ]
        worker.say(*(dispatch(number, request) for number, request in enumerate(huge)))
        for number in range(len(huge)):
            assert (await worker.end_of(number))[0].code == ContextOverflowError.code
        one_word = TextRequest(prompt="y" * 5_000, sampling=WHOLE)
        parts: list[dict[str, Any]] = [{"type": "text", "text": "c d"}]
        chat = GenerateRequest(messages=[{"role": "user", "content": parts}], sampling=SamplingParams(max_new_tokens=3))
        pictures: list[dict[str, Any]] = [{"type": "image", "image": bytes(30_000_000)}, *parts]
        picture = GenerateRequest(messages=[{"role": "user", "content": pictures}])
        worker.say(dispatch(10, one_word), dispatch(11, chat), dispatch(12, running), dispatch(15, picture))
        assert (await worker.end_of(15))[0].code == UnsupportedOperationError.code
        for number, text in ((10, "y" * 5_000 + " "), (11, "c d c "), (12, "a b ")):
            assert (await worker.end_of(number))[0].code == 0
            assert worker.text(number) == text
        worker.say(dispatch(13, EmbedRequest(inputs=["x"], dimensions=60_000)))
        assert (await worker.end_of(13))[0].code == ParameterRangeError.code
        worker.say(dispatch(14, EmbedRequest(inputs=["x"] * 20_000)))
        assert (await worker.end_of(14))[0].code == 0
        worker.at_rest()


@pytest.mark.parametrize(
    ("position", "sampling", "reason"),
    [(3, {"max_new_tokens": 3}, "length"), (2, {"max_new_tokens": 9, "stop_token_ids": (1,)}, "stop")],
)
async def test_echo_ends_an_answer_of_which_only_the_end_was_lost(
    monkeypatch: pytest.MonkeyPatch, position: int, sampling: dict[str, Any], reason: str
) -> None:
    async with bare_worker(monkeypatch, EchoWorker(EchoOptions(model_names=("m",)))) as worker:
        request = GenerateRequest(
            prompt="a b c",
            sampling=SamplingParams(**sampling),
            resume_token_ids=list(range(position)),
            resume_characters=2 * position,
        )
        worker.say(dispatch(1, request, resume_from=position))
        end, outcome = await worker.end_of(1)
        (chunk,) = worker.chunks
        assert chunk.extra is not None
        assert (end.code, worker.text(1), chunk.token_ids, chunk.extra.finish_reason) == (0, "", [], reason)
        assert outcome.usage == Usage(3, position)


async def test_a_count_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(Backend):
        async def load(self) -> ModelInfo:
            return ModelInfo(name=self.name, capabilities=["count_tokens"])

        async def count_tokens(self, request: CountRequest) -> int:
            counts: dict[str, Any] = {"one": np.int64(1), "half": 0.5}
            return counts[request.plain_text()]  # type: ignore[no-any-return]

    async with bare_worker(monkeypatch, Counts()) as worker:
        for number, text in enumerate(["one", "half"]):
            body = codec.encode(CountRequest(prompt=text))
            header, _ = dispatch(number, operation="count_tokens")
            worker.say((header, body))
        assert codec.unpack_result((await worker.end_of(0))[1].result, int) == 1
        assert (await worker.end_of(1))[0].code == BackendError.code
