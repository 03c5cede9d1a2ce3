"""Bounds that all backends keep, on a real engine: before anything is rendered, tokenized or computed."""

from __future__ import annotations

import pytest

from tests.backends.pictures import chat, png
from tests.backends.tiny import ask
from tests.backends.vllm_engine.conftest import Served, run
from zfabric import limits
from zfabric.backends.front import bounds
from zfabric.errors import ContextOverflowError, FabricError, ParameterRangeError, TooLargeError
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="package")

HUGE = "x" * 9_000_000


def asked(name: str, **prompt: object) -> GenerateRequest:
    return GenerateRequest(request_id=name, sampling=SamplingParams(max_new_tokens=2), **prompt)  # type: ignore[arg-type]


async def test_what_cannot_be_served_is_refused_before_any_work(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = served
    renderer = worker._served().engine.renderer
    for name in ("render_chat_async", "render_cmpl_async", "render_cmpl"):
        monkeypatch.setattr(renderer, name, lambda *_, **__: pytest.fail("it was rendered"))
    images = [{"type": "image", "image": png("red")}] * (limits.IMAGES_MAX + 1)
    large = [{"type": "image", "image": png("red", (4_000, 4_000))}] * 5
    wanted: dict[str, tuple[GenerateRequest, type[FabricError], str]] = {
        "text": (asked("text", prompt=HUGE), ContextOverflowError, "context is 512"),
        "chat": (asked("chat", messages=[{"role": "user", "content": HUGE}]), ContextOverflowError, "context is 512"),
        "tokens": (asked("tokens", prompt_token_ids=[5] * 600), ContextOverflowError, "prompt of 600 tokens"),
        "images": (asked("images", messages=chat(*images)), TooLargeError, f"{len(images)} images"),
        "pixels": (asked("pixels", messages=chat(*large)), TooLargeError, "80000000 pixels"),
        "logprobs": (ask("logprobs", logprobs=21), ParameterRangeError, "must be at most 20"),
        "prompt": (ask("prompt", prompt_logprobs=21), ParameterRangeError, "must be at most 20"),
    }
    await run(served, *(request for request, _, _ in wanted.values()))
    for name, (_, error, text) in wanted.items():
        assert isinstance(answers.errors[name], error), answers.errors[name]
        assert text in str(answers.errors[name])


async def test_log_probabilities_of_a_whole_prompt_fit_one_piece(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "PROMPT_LOGPROBS_MAX", 100)
    answers = await run(
        served, ask("fits", "x" * 30, prompt_logprobs=2, max_new_tokens=1), ask("more", "x" * 40, prompt_logprobs=2)
    )
    assert "fits" not in answers.errors
    assert isinstance(answers.errors["more"], ParameterRangeError)
    assert "for a prompt of 40 tokens" in str(answers.errors["more"])
