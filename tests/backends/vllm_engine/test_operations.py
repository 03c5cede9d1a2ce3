"""An operator's calls to a worker on a tiny random model."""

from __future__ import annotations

import pytest

from tests.backends.tiny import ask
from tests.backends.vllm_engine.conftest import Served, operate, run
from zfabric.errors import RequestError, UnsupportedOperationError, WorkerDrainingError
from zfabric.wire.payloads import CountRequest
from zfabric.wire.tasks import ClassifyRequest, DetokenizeRequest

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_operators_calls_that_cannot_be_done_say_why(served: Served) -> None:
    worker, _ = served
    with pytest.raises(UnsupportedOperationError, match="vllm has no call 'fly', it has list_adapters"):
        await operate(worker, "fly")
    with pytest.raises(UnsupportedOperationError, match="--enable-sleep-mode"):
        await operate(worker, "sleep")
    with pytest.raises(RequestError, match="path is missing, speed is unknown"):
        await operate(worker, "load_adapter", name="x", speed=3)
    with pytest.raises(UnsupportedOperationError, match="does not classify"):
        await worker.classify(ClassifyRequest(inputs=["x"]))


async def test_tokens_of_a_text_and_back(served: Served) -> None:
    worker, _ = served
    tokens = await worker.tokenize(CountRequest(prompt="Hello there"))
    assert len(tokens) == await worker.count_tokens(CountRequest(prompt="Hello there"))
    assert await worker.detokenize(DetokenizeRequest(token_ids=tokens, skip_special_tokens=True)) == "Hello there"
    with pytest.raises(RequestError, match="outside of the vocabulary"):
        await worker.detokenize(DetokenizeRequest(token_ids=[10**6]))


@pytest.mark.parametrize("level", [1, 2])
async def test_a_sleeping_engine_takes_nothing_until_it_is_woken(
    served: Served, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """On a CPU vLLM refuses the setting, and then does all but freeing memory, which is a matter of its own."""
    worker, answers = served
    runtime = worker._runtime
    assert runtime is not None
    monkeypatch.setattr(runtime.engine.vllm_config.model_config, "enable_sleep_mode", True)
    await run(served, ask("before", temperature=0, max_new_tokens=8, ignore_eos=True))
    worker.begin(ask("long", temperature=0, max_new_tokens=480, ignore_eos=True))
    await answers.until("long", tokens=3)
    assert await operate(worker, "sleep", level=level) is True
    await answers.until("long")
    assert isinstance(answers.errors["long"], WorkerDrainingError)
    assert worker.load_report().slots == 0
    with pytest.raises(WorkerDrainingError, match="sleeps"):
        worker.begin(ask("asleep"))
    assert await runtime.engine.is_sleeping()
    assert await operate(worker, "wake_up") is True
    assert await operate(worker, "wake_up") is True
    assert not await runtime.engine.is_sleeping()
    assert worker.load_report().slots is None
    await run(served, ask("after", temperature=0, max_new_tokens=8, ignore_eos=True))
    assert answers.tokens("after") == answers.tokens("before")
    with pytest.raises(RequestError, match="it must be 1 or 2"):
        await operate(worker, "sleep", level=3)
