"""An operator's calls to a worker on a tiny random model."""

from __future__ import annotations

import pytest

from tests.backends.tiny import ask
from tests.backends.vllm_engine.conftest import Served, operate, run
from zfabric.errors import RequestError, UnsupportedOperationError, WorkerDrainingError

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_operators_calls_that_cannot_be_done_say_why(served: Served) -> None:
    worker, _ = served
    with pytest.raises(UnsupportedOperationError, match="vllm has no call 'fly', it has classify"):
        await operate(worker, "fly")
    with pytest.raises(UnsupportedOperationError, match="--enable-sleep-mode"):
        await operate(worker, "sleep")
    with pytest.raises(RequestError, match="path is missing, speed is unknown"):
        await operate(worker, "load_adapter", name="x", speed=3)
    with pytest.raises(UnsupportedOperationError, match="does not classify"):
        await operate(worker, "classify", inputs=["x"])
    with pytest.raises(RequestError, match="inputs is no list of texts"):
        await operate(worker, "classify", inputs="x")


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
