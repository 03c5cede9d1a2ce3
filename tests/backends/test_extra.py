"""Keys of `extra` that the backends honour: on tiny models, against what transformers makes of the same, and on a fake server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.faulty import EVENTS, answer, api_worker, chat_event, faulty, usual
from tests.backends.faulty import ask as ask_server
from tests.backends.tiny import Answers, ask, reference
from zfabric.backends.front.stop_strings import StopStrings
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.wire.payloads import Delta, GenerateRequest

PROMPT = "Hello there"


def asked(name: str, extra: dict[str, Any], **sampling: Any) -> GenerateRequest:
    request = ask(name, PROMPT, ignore_eos=True, **{"temperature": 0, "max_new_tokens": 16, **sampling})
    return structs.replace(request, extra=extra)


async def run(worker: ModelWorker, answers: Answers, *requests: GenerateRequest) -> None:
    for request in requests:
        worker.begin(request)
    await answers.until(*(request.request_id for request in requests))


async def test_only_allowed_tokens_are_drawn_and_the_likeliest_of_them(
    tiny_worker: tuple[ModelWorker, Answers], tiny_llama: Path
) -> None:
    worker, answers = tiny_worker
    allowed = [40, 41, 42, 77]
    await run(
        worker,
        answers,
        asked("allowed", {"allowed_token_ids": allowed}),
        asked("free", {}),
        asked("drawn", {"allowed_token_ids": allowed}, temperature=1.5, seed=3),
        asked("one", {"allowed_token_ids": [77]}, temperature=1.0, seed=3, n=2),
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    wanted = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=2,
        prefix_allowed_tokens_fn=lambda *_: allowed,
    )  # fmt: skip
    assert answers.tokens("allowed") == wanted[0, inputs["input_ids"].shape[1] :].tolist()
    # A neighbour in the same batch is free to draw what it will.
    assert answers.tokens("free") == reference(tiny_llama, PROMPT, 16)
    assert set(answers.tokens("drawn")) <= set(allowed)
    assert len(set(answers.tokens("drawn"))) > 1
    assert [answers.tokens("one", index) for index in range(2)] == [[77] * 16] * 2


async def test_a_stop_string_stays_in_the_text_where_that_is_asked_for(
    tiny_worker: tuple[ModelWorker, Answers],
) -> None:
    worker, answers = tiny_worker
    await run(worker, answers, asked("free", {}))
    text = answers.text("free")
    stop = next(text[at : at + 2] for at in range(4, len(text)) if text.index(text[at : at + 2]) == at)
    await run(
        worker,
        answers,
        asked("with", {"include_stop": True}, stop=(stop, "not there")),
        asked("without", {"include_stop": False}, stop=(stop,)),
    )
    assert answers.text("without") == text[: text.index(stop)]
    assert answers.text("with") == answers.text("without") + stop
    assert answers.last("with").finish_reason == answers.last("without").finish_reason == "stop"


async def test_tokens_may_come_without_text(tiny_worker: tuple[ModelWorker, Answers], tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    await run(worker, answers, asked("mute", {"detokenize": False}))
    assert answers.tokens("mute") == reference(tiny_llama, PROMPT, 16)
    assert answers.text("mute") == ""
    await run(worker, answers, asked("stop", {"detokenize": False}, stop=("x",)))
    assert isinstance(answers.errors["stop"], RequestError)


async def test_tokens_that_the_model_has_not_got_are_refused_by_name(
    tiny_worker: tuple[ModelWorker, Answers],
) -> None:
    worker, answers = tiny_worker
    await run(worker, answers, asked("odd", {"allowed_token_ids": [1, 9_999]}))
    error = answers.errors["odd"]
    assert isinstance(error, ParameterRangeError)
    assert error.details["parameter"] == "allowed_token_ids"


def test_a_stop_string_that_is_shown_comes_whole_and_once() -> None:
    for pieces in (["abcEND", "xyz"], ["abcE", "ND", "x"], ["abc", "E", "N", "D"]):
        stops = StopStrings(["END"], shown=True)
        shown, found = "", False
        for piece in pieces:
            if not found:
                text, found = stops.add(piece)
                shown += text
        assert (shown, found) == ("abcEND", True)


# ── servers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_s_own_options_go_into_the_body(tmp_path: Path) -> None:
    options = {"reasoning": {"effort": "low"}, "provider": ["a", "b"], "user": "someone"}
    async with faulty(usual()) as server, api_worker(tmp_path, server.url) as worker:
        await ask_server(worker, extra=options)
        body = server.asked[0].body
        assert {name: body[name] for name in options} == options
        assert body["messages"] == [{"role": "user", "content": "hi"}]
        for name in ("model", "stream", "max_tokens", "messages", "stop", "tools"):
            with pytest.raises(UnsupportedParameterError, match=f"extra '{name}'"):
                await ask_server(worker, extra={name: 1})
        # Nobody knows what an unknown server would make of what has a meaning of its own.
        for name in ("allowed_token_ids", "detokenize", "cache_salt"):
            with pytest.raises(UnsupportedParameterError, match=f"extra '{name}' is not known to model 'm'"):
                await ask_server(worker, extra={name: 1})
        with pytest.raises(RequestError, match="as JSON"):
            await ask_server(worker, extra={"image": b"bytes"})
        assert len(server.asked) == 1


async def test_a_vllm_server_has_them_under_its_own_names(tmp_path: Path) -> None:
    extra = {"cache_salt": "s", "allowed_token_ids": [1], "extra_args": {"a": 1}, "kv_transfer_params": {"b": 2}}
    async with faulty(usual()) as server, api_worker(tmp_path, server.url, server="vllm") as worker:
        await ask_server(worker, extra=extra)
        body = server.asked[0].body
        assert (body["cache_salt"], body["allowed_token_ids"]) == ("s", [1])
        assert (body["vllm_xargs"], body["kv_transfer_params"]) == ({"a": 1}, {"b": 2})
        with pytest.raises(UnsupportedParameterError, match="detokenize"):
            await ask_server(worker, extra={"detokenize": False})


async def test_text_generation_has_them_among_its_parameters(tmp_path: Path) -> None:
    event = (
        b'data: {"token": {"id": 5, "text": "a"}, "generated_text": "a", "details": {"finish_reason": "length"}}\n\n'
    )
    async with (
        faulty(answer(EVENTS, event)) as server,
        api_worker(tmp_path, server.url, protocol="tgi", server="tgi") as worker,
    ):
        await ask_server(worker, extra={"watermark": True})
        assert server.asked[0].body["parameters"]["watermark"] is True


async def test_what_a_server_tells_besides_is_told_once(tmp_path: Path) -> None:
    events = [
        chat_event("a", id="x", object="o", system_fingerprint="fp_1", obfuscation="zzz"),
        chat_event("b", system_fingerprint="fp_1"),
        chat_event(finish="stop", system_fingerprint="fp_2"),
        b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "citations": ["u"]}\n\n',
        b"data: [DONE]\n\n",
    ]
    async with faulty(answer(EVENTS, *events)) as server, api_worker(tmp_path, server.url) as worker:
        deltas: list[Delta] = await ask_server(worker)
    assert [delta.extra for delta in deltas] == [
        {"system_fingerprint": "fp_1"},
        None,
        {"system_fingerprint": "fp_2", "citations": ["u"]},
    ]


async def test_a_server_s_text_keeps_its_stop_string_where_that_is_asked_for(tmp_path: Path) -> None:
    script = answer(EVENTS, chat_event("one EN"), chat_event("D two"), chat_event(finish="length"), b"data: [DONE]\n\n")
    async with faulty(script) as server, api_worker(tmp_path, server.url) as worker:
        deltas = await ask_server(worker, stop=("END",), extra={"include_stop": True})
        # A server that looked for it would leave it out.
        assert "stop" not in server.asked[0].body
    assert "".join(delta.text for delta in deltas) == "one END"
    assert deltas[-1].finish_reason == "stop"
