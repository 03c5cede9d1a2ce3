"""Keys of `extra` on a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.backends.tiny import ask, reference
from tests.backends.vllm_engine.conftest import Served, run
from zfabric.backends.vllm_engine import sampling
from zfabric.errors import RequestError
from zfabric.wire.payloads import GenerateRequest

pytestmark = pytest.mark.asyncio(loop_scope="package")

PROMPT = "The quick brown fox jumps"


def asked(name: str, extra: dict[str, Any], prompt: str = PROMPT, **sampling: Any) -> GenerateRequest:
    request = ask(name, prompt, ignore_eos=True, **{"temperature": 0, "max_new_tokens": 16, **sampling})
    return structs.replace(request, extra=extra)


async def test_a_stop_string_stays_and_tokens_are_the_allowed_ones(served: Served, vllm_llama: Path) -> None:
    answers = await run(served, asked("free", {}), asked("allowed", {"allowed_token_ids": [40, 41]}))
    text = answers.text("free")
    assert answers.tokens("free") == reference(vllm_llama, PROMPT, 16)
    assert set(answers.tokens("allowed")) <= {40, 41}
    stop = next(text[at : at + 2] for at in range(4, len(text)) if text.index(text[at : at + 2]) == at)
    await run(
        served, asked("with", {"include_stop": True}, stop=(stop,)), asked("without", {"include_stop": False}, stop=(stop,))
    )  # fmt: skip
    assert answers.text("without") == text[: text.index(stop)]
    assert answers.text("with") == answers.text("without") + stop
    await run(served, asked("odd", {"allowed_token_ids": [10**6]}))
    assert isinstance(answers.errors["odd"], RequestError)


async def test_tokens_without_text_and_their_continuation(served: Served, vllm_llama: Path) -> None:
    tokens = reference(vllm_llama, PROMPT, 16)
    answers = await run(
        served,
        asked("mute", {"detokenize": False}),
        asked("continued", {"detokenize": False}, resume_token_ids=tokens[:5]),
        asked("refused", {"detokenize": False}, stop=("x",)),
    )
    assert (answers.tokens("mute"), answers.text("mute")) == (tokens, "")
    assert (answers.tokens("continued"), answers.text("continued")) == (tokens[5:], "")
    assert isinstance(answers.errors["refused"], RequestError)


async def test_cached_prefixes_are_found_by_the_same_salt_alone(served: Served) -> None:
    prompt = "one two three four five six seven " * 4
    cached = []
    for number, salt in enumerate(("a", "a", "b", None)):
        extra = {} if salt is None else {"cache_salt": salt}
        answers = await run(served, asked(f"salt {number}", extra, prompt, max_new_tokens=1))
        usage = answers.last(f"salt {number}").usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    assert cached[1] >= 96
    assert [cached[0], cached[2], cached[3]] == [0, 0, 0]


async def test_what_is_for_plug_ins_goes_along_and_what_nobody_would_read_is_not_known(served: Served) -> None:
    worker, _ = served
    request = asked("arguments", {"extra_args": {"plug-in": [1]}, "kv_transfer_params": {"a": 1}})
    assert sampling.translate(request).extra_args == {"plug-in": [1], "kv_transfer_params": {"a": 1}}
    # Blocks that wait for one taker have been taken by the attempt before.
    assert sampling.translate(structs.replace(request, resume_token_ids=[5])).extra_args == {"plug-in": [1]}
    [model] = worker._models()
    assert model.extra == ["allowed_token_ids", "cache_salt", "detokenize", "extra_args", "include_stop"]
