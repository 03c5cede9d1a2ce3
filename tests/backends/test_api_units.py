"""Parts of the hf-api backend that need no network."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.backends.hf_api.answers import AnswerReader
from zfabric.backends.hf_api.breaker import CircuitBreaker
from zfabric.backends.hf_api.events import EventReader
from zfabric.backends.hf_api.failures import backoff_s, retry_after_s
from zfabric.backends.hf_api.models_file import Upstream, read_models_file
from zfabric.backends.hf_api.requests import body_of, options_for, parameters_of
from zfabric.errors import ConfigurationError, RequestError, UnsupportedOperationError
from zfabric.wire.chat import ChatOptions
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.sampling import SamplingOptions, SamplingParams

URL = "http://127.0.0.1:1"


@given(st.lists(st.sampled_from(["ok", "fail", "probe", "wait"])))
def test_a_breaker_never_gets_stuck(steps: list[str]) -> None:
    breaker, now = CircuitBreaker(2, 1.0, 4.0), 0.0
    for step in steps:
        if step == "ok":
            breaker.succeeded()
        elif step == "fail":
            breaker.failed(now)
        elif step == "wait":
            now += 1.0
        elif breaker.begin_probe(now):
            assert not breaker.begin_probe(now)
            breaker.probed()
        assert breaker.wait_s(now) <= 4.0
    breaker.begin_probe(now + 4.0)
    breaker.probed()
    assert breaker.dispatchable


def test_a_breaker_opens_for_longer_each_time() -> None:
    breaker = CircuitBreaker(2, 1.0, 4.0)
    assert [breaker.failed(0.0), breaker.failed(0.0), breaker.failed(0.0)] == [False, True, False]
    times = [breaker.wait_s(0.0)]
    for _ in range(3):
        assert not breaker.begin_probe(times[-1] - 0.5)
        assert breaker.begin_probe(times[-1])
        breaker.failed(0.0)
        times.append(breaker.wait_s(0.0))
    assert times == [1.0, 2.0, 4.0, 4.0]
    assert breaker.begin_probe(4.0)
    breaker.probed()
    assert breaker.failed(0.0)
    assert breaker.begin_probe(4.0)
    breaker.probed()
    breaker.succeeded()
    assert not breaker.failed(0.0)


@given(st.lists(st.binary(max_size=12).filter(lambda data: b"\n" not in data and b"\r" not in data)), st.data())
def test_events_come_whole_however_they_are_cut(datas: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(b": c\n\ndata: " + item + b"\r\nid: 1\r\n\r\n" for item in datas)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader, found = EventReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == datas


def test_waits_follow_what_the_server_asks() -> None:
    rng = random.Random(1)
    assert retry_after_s("2", None) == 2
    assert retry_after_s("Thu, 01 Jan 1970 00:00:09 GMT", "Thu, 01 Jan 1970 00:00:04 GMT") == 5
    assert retry_after_s("Thu, 01 Jan 1970 00:00:09 GMT", None) is None
    assert retry_after_s("soon", "Thu, 01 Jan 1970 00:00:04 GMT") is None
    assert 2 <= (backoff_s(0, 2.0, rng) or 0) < 2.5
    assert backoff_s(0, 1e6, rng) is None
    assert 0.4 <= (backoff_s(2, None, rng) or 0) <= 0.8


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "base_url: is missing"),
        ({"base_url": "ftp://x"}, "base_url: must be an http"),
        ({"base_url": "http://user:hf_secret@x"}, "base_url: must not hold credentials"),
        ({"base_url": URL, "token": "hf_secret"}, "token: is not allowed"),
        ({"base_url": URL, "token_env": "NO_SUCH_VARIABLE"}, "token_env: names the variable"),
        ({"base_url": URL, "token_file": "no-such-file"}, "token_file: 'no-such-file' cannot be read"),
        ({"base_url": URL, "protocol": "soap"}, "protocol: is 'soap'"),
        ({"base_url": URL, "slots": 0}, "slots: is 0"),
        ({"base_url": URL, "slot": 1}, "slot: is unknown"),
        ({"base_url": URL, "headers": {"X-Key": 7}}, "headers: must be a table"),
        ({"base_url": URL, "headers": {"X-Key": "hf_secret\n"}}, "headers: must be printable"),
        ({"base_url": URL, "server": "tgi"}, "server: 'tgi' does not speak 'chat'"),
        ({"base_url": URL, "aliases": ["b"]}, "aliases: 'b' is a name of"),
    ],
)
def test_a_wrong_file_names_entry_and_key_but_no_secret(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"models": {"a": entry, "b": {"base_url": URL}}}))
    with pytest.raises(ConfigurationError) as caught:
        read_models_file(path)
    assert "model 'a'" in str(caught.value) or "model 'b'" in str(caught.value)
    assert said in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_toml_and_fastchat_files(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret\n")
    toml = tmp_path / "models.toml"
    toml.write_text(f'[models.a]\nbase_url = "{URL}/v1"\ntoken_file = "token"\naliases = ["b"]\n')
    (made,) = read_models_file(toml)
    assert (made.name, made.aliases, made.token, made.model) == ("a", ("b",), "hf_secret", "a")
    assert "hf_secret" not in repr(made)
    old = tmp_path / "models.json"
    entry = {"model_path": "org/x", "api_base": URL, "token": "hf_secret", "context_length": 9, "model_names": "x,y"}
    old.write_text(json.dumps({"falcon": entry}))
    (made,) = read_models_file(old)
    assert (made.name, made.aliases, made.base_url, made.protocol) == ("x", ("y",), f"{URL}/org/x", "tgi")


def test_every_parameter_that_is_honoured_is_in_the_body() -> None:
    values: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.6, "top_k": 7, "min_p": 0.1, "typical_p": 0.3, "repetition_penalty": 1.5,
        "presence_penalty": 0.25, "frequency_penalty": 0.75, "max_new_tokens": 11, "min_new_tokens": 2, "stop": ("q",),
        "stop_token_ids": (5,), "ignore_eos": True, "seed": 13, "n": 3, "logprobs": 4, "logit_bias": {1: 2.0},
        "bad_words": ("z",), "guided_json": "{}", "guided_regex": "a", "guided_choice": ("c",), "guided_grammar": "g",
        "skip_special_tokens": False,
    }  # fmt: skip
    for protocol, server in (("chat", "openai"), ("completions", "vllm"), ("tgi", "tgi"), ("chat", "transformers")):
        upstream = Upstream(name="m", base_url=URL, protocol=protocol, server=server)  # type: ignore[arg-type]
        plain = body_of(upstream, GenerateRequest(prompt="x"), None)
        for name in parameters_of(upstream):
            request = GenerateRequest(prompt="x", sampling=SamplingParams(**{name: values[name]}))
            assert body_of(upstream, request, None) != plain, f"{name} has no effect on {server}"


def test_what_has_no_place_is_refused() -> None:
    tgi = Upstream(name="m", base_url=URL, protocol="tgi", server="tgi")
    plain = Upstream(name="m", base_url=URL, protocol="completions", server="vllm")
    for upstream, request in (
        (tgi, GenerateRequest(messages=[{"role": "user", "content": "x"}])),
        (tgi, GenerateRequest(prompt="x", tools=[{}])),
        (tgi, GenerateRequest(prompt="x", response_format={"type": "json_object"})),
        (plain, GenerateRequest(prompt="x", tools=[{}])),
        (plain, GenerateRequest(prompt="x", response_format={"type": "json_object"})),
    ):
        with pytest.raises(UnsupportedOperationError):
            body_of(upstream, request, None)
    rendered = GenerateRequest(messages=[{"role": "user", "content": "x"}], tools=[{}])
    assert body_of(plain, rendered, [1, 2])["prompt"] == [1, 2]


def test_options_are_announced_where_they_have_a_place() -> None:
    """The worker refuses the others by name, before a backend is asked."""
    told = {"chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"}
    chat = Upstream(name="m", base_url=URL, protocol="chat", server="vllm")
    called = {"tools", "response_format", "tool_choice", "parallel_tool_calls"}
    assert options_for(chat, templated=False) == {*called, *told}
    assert options_for(dataclasses.replace(chat, server="openai"), templated=False) == called
    served = dataclasses.replace(chat, server="transformers")
    assert options_for(served, templated=False) == {"tools", "response_format"}
    plain = Upstream(name="m", base_url=URL, protocol="completions", server="vllm")
    assert options_for(plain, templated=False) == frozenset()
    assert options_for(plain, templated=True) == {"tools", *told}
    assert options_for(Upstream(name="m", base_url=URL, protocol="tgi", server="tgi"), templated=False) == frozenset()


def test_what_a_template_is_told_goes_to_servers_by_its_own_names() -> None:
    upstream = Upstream(name="m", base_url=URL, protocol="chat", server="vllm")
    messages = [{"role": "user", "content": "x"}]
    plain = body_of(upstream, GenerateRequest(messages=messages), None)
    assert not plain.keys() & {"chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"}
    chat = ChatOptions(chat_template_kwargs={"enable_thinking": False}, documents=[{"text": "a"}])
    body = body_of(upstream, GenerateRequest(messages=messages, chat=chat), None)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["documents"], body["add_generation_prompt"]) == ([{"text": "a"}], True)
    body = body_of(upstream, GenerateRequest(messages=messages, chat=ChatOptions(continue_final_message=True)), None)
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_text_generation_tells_true_tokens_and_logprobs() -> None:
    upstream = Upstream(name="m", base_url=URL, protocol="tgi", server="tgi")
    reader = AnswerReader(upstream, GenerateRequest(prompt="x", sampling=SamplingParams(logprobs=1, stop=("!",))))
    token = {"id": 7, "text": "hi", "logprob": -0.5, "special": False}
    (delta,) = reader.take(json.dumps({"token": token, "top_tokens": [token]}).encode())
    assert (delta.text, delta.token_ids) == ("hi", [7])
    assert delta.logprobs is not None
    assert (delta.logprobs[0].token.logprob, delta.logprobs[0].top[0].token_id) == (-0.5, 7)
    last = {"token": {"id": 8, "text": "!", "special": False}, "details": {"finish_reason": "stop_sequence"}}
    reader.take(json.dumps(last).encode())
    assert reader.ended
    assert not reader.stopped_here
    assert reader.text == "hi"


def test_images_that_are_bytes_become_addresses() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": b"\xff\xd8\xffrest"}]
    body = body_of(
        Upstream(name="m", base_url=URL), GenerateRequest(messages=[{"role": "user", "content": parts}]), None
    )
    uri = "data:image/jpeg;base64,/9j/cmVzdA=="
    assert body["messages"][0]["content"] == [parts[0], {"type": "image_url", "image_url": {"url": uri}}]
    json.dumps(body)
    wrong = [{"role": "user", "content": [{"type": "input_audio", "input_audio": b"x"}]}]
    with pytest.raises(RequestError, match="holds bytes"):
        body_of(Upstream(name="m", base_url=URL), GenerateRequest(messages=wrong), None)


def test_a_ban_is_said_in_json() -> None:
    sampling = SamplingParams(logit_bias={5: float("-inf"), 6: 2.0})
    body = body_of(Upstream(name="m", base_url=URL), GenerateRequest(prompt="x", sampling=sampling), None)
    assert body["logit_bias"] == {"5": -100.0, "6": 2.0}


def test_what_is_unset_is_left_to_the_server() -> None:
    unset = SamplingOptions(seed=0).resolved({})
    chat = body_of(Upstream(name="m", base_url=URL), GenerateRequest(prompt="x", sampling=unset), None)
    assert set(chat) == {"model", "stream", "messages", "stream_options", "seed"}
    completions = Upstream(name="m", base_url=URL, protocol="completions", server="vllm")
    body = body_of(completions, GenerateRequest(prompt="x", sampling=unset), None)
    assert set(body) == {"model", "stream", "prompt", "stream_options", "seed", "max_tokens", "return_token_ids"}
    tgi = Upstream(name="m", base_url=URL, protocol="tgi", server="tgi")
    assert "temperature" not in body_of(tgi, GenerateRequest(prompt="x", sampling=unset), None)["parameters"]
    neutral = SamplingOptions(temperature=1.0, top_p=1.0, max_new_tokens=256).resolved({})
    said = body_of(Upstream(name="m", base_url=URL), GenerateRequest(prompt="x", sampling=neutral), None)
    assert (said["temperature"], said["top_p"], said["max_tokens"]) == (1.0, 1.0, 256)


def test_what_ended_an_answer_is_told_where_the_caller_named_it() -> None:
    upstream = Upstream(name="m", base_url=URL, protocol="completions")

    def ending(reason: object, text: str = "hi") -> Delta:
        sampling = SamplingParams(stop=("!",), stop_token_ids=(9,))
        reader = AnswerReader(upstream, GenerateRequest(prompt="x", sampling=sampling))
        told = {"index": 0, "text": text, "finish_reason": "stop", "stop_reason": reason}
        reader.take(json.dumps({"choices": [told]}).encode())
        return reader.finish(None)[-1]

    assert [ending(reason).stop_reason for reason in ("!", 9, 10, "eos", None, ["!"])] == [
        "!",
        9,
        None,
        None,
        None,
        None,
    ]
    assert ending(None, "hi! and more").stop_reason == "!", "it was found here"
