"""Settings of vLLM's own that the worker has to live with: no log-probabilities, traces of requests, addresses."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from tests.backends.tiny import Answers, ask
from tests.backends.vllm_engine.conftest import TINY
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import ContextOverflowError, ParameterRangeError, RequestError
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

#: Nobody listens there: traces are dropped in the background.
NOWHERE = "http://127.0.0.1:9/v1/traces"


@pytest.mark.timeout(300)
async def test_an_engine_with_traces_and_without_log_probabilities_serves(vllm_llama: Path) -> None:
    argv = [*TINY, "--max-logprobs", "0", "--otlp-traces-endpoint", NOWHERE]
    worker = VLLMWorker(["--model", str(vllm_llama), *argv])
    worker.steps = answers = Answers()
    await worker.load()
    try:
        for number in range(3):
            worker.begin(ask(f"{number}", temperature=0, max_new_tokens=5, ignore_eos=True))
        worker.begin(ask("told", max_new_tokens=2, logprobs=1))
        worker.begin(ask("huge", "x" * 5_000_000))
        worker.begin(fetching("fetched"))
        names = ["0", "1", "2", "told", "huge", "fetched"]
        async with asyncio.timeout(60):
            await answers.until(*names)
        assert all(len(answers.tokens(name)) == 5 for name in names[:3])
        assert isinstance(answers.errors["told"], ParameterRangeError | RequestError)
        assert isinstance(answers.errors["huge"], ContextOverflowError)
        assert "allowed-media-domains" in str(answers.errors["fetched"])
        # It has lived through the first answer's end.
        worker.begin(ask("after", temperature=0, max_new_tokens=5, ignore_eos=True))
        await answers.until("after")
        assert answers.tokens("after") == answers.tokens("0")
    finally:
        await worker.close()
        await asyncio.to_thread(end_traces)


def end_traces() -> None:
    """Ends the thread that vLLM leaves in the process: it draws from `random`, which tests by properties do not allow others."""
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    assert exporting()
    provider.shutdown()
    assert not exporting()


def exporting() -> bool:
    return any("BatchSpanRecordProcessor" in thread.name for thread in threading.enumerate())


def fetching(name: str) -> GenerateRequest:
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    messages = [{"role": "user", "content": [part]}]
    return GenerateRequest(messages=messages, request_id=name, sampling=SamplingParams(max_new_tokens=2))
