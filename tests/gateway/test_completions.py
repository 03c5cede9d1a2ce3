"""/v1/completions, and /generate and /inference/v1/generate."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.backends import Recorder
from tests.gateway.conftest import gateway
from zfabric.backends.echo import EchoWorker
from zfabric.client.requests import generate_request
from zfabric.gateway.completions import CompletionRequest, completion_options
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.words import OldLogprobs
from zfabric.wire.payloads import Logprob, TokenLogprobs


async def test_a_prompt_has_sixteen_tokens_unless_it_says_otherwise() -> None:
    async with gateway(EchoWorker()) as served:
        answer = await served.openai.completions.create(model="echo", prompt="a b")
        assert answer.choices[0].text == "a b " * 8
        assert answer.object == "text_completion"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 16)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a b", ["a b a "]),
        (["a b", "c"], ["a b a ", "c c c "]),
        ([5, 6], ["5 6 5 "]),
        ([[5, 6], [7]], ["5 6 5 ", "7 7 7 "]),
    ],
)
async def test_prompts_of_all_kinds(prompt: Any, texts: list[str], stream: bool) -> None:
    async with gateway(EchoWorker()) as served:
        options: Any = {"model": "echo", "prompt": prompt, "max_tokens": 3}
        found = [""] * len(texts)
        if stream:
            chunks = [chunk async for chunk in await served.openai.completions.create(**options, stream=True)]
            for chunk in chunks:
                found[chunk.choices[0].index] += chunk.choices[0].text
            assert [chunk.choices[0].finish_reason for chunk in chunks].count("length") == len(texts)
        else:
            for choice in (await served.openai.completions.create(**options)).choices:
                found[choice.index] = choice.text
        assert found == texts


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts_are_numbered_through_with_log_probabilities(stream: bool) -> None:
    async with gateway(Recorder()) as served:
        options: Any = {"model": "recorder", "prompt": ["a", "b"], "n": 2, "logprobs": 1}
        tokens: dict[int, list[str]] = {n: [] for n in range(4)}
        offsets: dict[int, list[int]] = {n: [] for n in range(4)}

        def add(choice: Any) -> None:
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset

        if stream:
            async for chunk in await served.openai.completions.create(**options, stream=True):
                add(chunk.choices[0])
        else:
            for choice in (await served.openai.completions.create(**options)).choices:
                add(choice)
                assert choice.logprobs.token_logprobs == [-0.5, -0.5, -0.1]
                assert choice.logprobs.top_logprobs[0] == {"gr": -0.5, "x": -1.5}
        assert list(tokens.values()) == [["gr", "ün", ""]] * 4
        assert list(offsets.values()) == [[0, 2, 4]] * 4


def test_the_first_token_of_a_prompt_has_its_text_but_nothing_that_predicts_it() -> None:
    entries = [None, *(TokenLogprobs(Logprob(n, -1.0, text), [Logprob(9, -0.5, "x")]) for n, text in enumerate("bc"))]
    told = OldLogprobs().of(entries, "aabc")
    assert (told["tokens"], told["text_offset"]) == (["aa", "b", "c"], [0, 2, 3])
    assert told["token_logprobs"] == [None, -1.0, -1.0]
    # The token itself is there even if it is not among the likeliest.
    assert told["top_logprobs"] == [None, {"x": -0.5, "b": -1.0}, {"x": -0.5, "c": -1.0}]
    # A mark that the text does not show has no text.
    assert OldLogprobs().of(entries, "bc")["text_offset"] == [0, 0, 1]


async def test_fields_of_its_own_reach_the_backend() -> None:
    recorder = Recorder()
    async with gateway(recorder) as served:
        await served.openai.completions.create(
            model="recorder", prompt="a", echo=True, logprobs=2, best_of=3, max_tokens=7
        )
        sampling = recorder.requests[0].sampling
        assert (sampling.echo, sampling.logprobs, sampling.prompt_logprobs, sampling.best_of) == (True, 2, 2, 3)
        assert sampling.max_new_tokens == 7


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt[0][0]"),
        ({"messages": []}, "messages"),
        ({"best_of": 1, "n": 2}, "best_of"),
    ],
)
async def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], parameter: str) -> None:
    async with gateway(EchoWorker()) as served:
        with pytest.raises(openai.BadRequestError) as refused:
            await served.openai.completions.create(model="echo", prompt="a", extra_body=change)
        assert refused.value.param == parameter


async def test_token_ids_in_and_out() -> None:
    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        asked = {"model": "echo", "prompt_token_ids": [9, 8], "max_tokens": 3}
        answer = (await web.post("/generate", json=asked)).json()
        assert answer["choices"][0]["token_ids"] == [0, 1, 0]
        assert (answer["choices"][0]["text"], answer["worker"]) == ("9 8 9 ", "worker")
        assert answer["usage"]["total_tokens"] == 5
        stream = (await web.post("/generate", json={**asked, "stream": True})).text
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        assert [token for event in events[:-1] for token in event["token_ids"]] == [0, 1, 0]
        assert events[-1]["usage"] == answer["usage"]
        assert stream.endswith("data: [DONE]\n\n")
        refused = await web.post("/generate", json={"model": "echo"})
        assert refused.status_code == 400


@pytest.mark.parametrize("mode", ["tokens", "text"])
async def test_vllms_form_of_tokens_in_and_out(mode: str) -> None:
    recorder = Recorder()
    async with gateway(recorder) as served, httpx.AsyncClient(base_url=served.url) as web:
        asked: dict[str, Any] = {
            "token_ids": [9, 8], "output_mode": mode, "return_token_ids": True, "request_id": "mine",
            "sampling_params": {"logprobs": 1, "seed": 3, "logit_bias": {"5": -1}, "min_tokens": 2},
        }  # fmt: skip
        answer = (await web.post("/inference/v1/generate", json=asked)).json()
        [choice] = answer["choices"]
        assert (answer["request_id"], answer["model"], answer["prompt_token_ids"]) == ("mine", "recorder", [9, 8])
        assert (choice["token_ids"], choice["finish_reason"]) == ([7, 8, 2], "stop")
        assert choice.get("text") == (None if mode == "tokens" else "grün")
        first = choice["logprobs"]["content"][0]
        assert (first["logprob"], len(first["top_logprobs"])) == (-0.5, 1)
        assert first["token_id" if mode == "tokens" else "token"] == (7 if mode == "tokens" else "gr")
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = (await web.post("/inference/v1/generate", json=asked | options)).text
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        assert [token for event in events[:-1] for token in event["choices"][0]["token_ids"]] == [7, 8, 2]
        assert events[0]["prompt_token_ids"] == [9, 8]
        assert (events[-1]["choices"], events[-1]["usage"]) == ([], answer["usage"])
    request = recorder.requests[0]
    assert (request.prompt_token_ids, request.sampling.seed, request.sampling.logit_bias) == ([9, 8], 3, {5: -1})
    assert (request.sampling.max_new_tokens, request.sampling.min_new_tokens) == (None, 2)


async def test_what_vllms_form_of_tokens_lacks_is_refused_by_name() -> None:
    async with gateway(EchoWorker(), Recorder()) as served, httpx.AsyncClient(base_url=served.url) as web:

        async def refused(**change: Any) -> str:
            asked = {"token_ids": [1], "sampling_params": {}, **change}
            response = await web.post("/inference/v1/generate", json=asked)
            assert response.status_code == 400
            return str(response.json()["error"]["param"])

        assert await refused() == "model"
        assert await refused(model="echo", features={}) == "features"
        assert await refused(model="echo", sampling_params={"detokenize": False}) == "sampling_params.detokenize"


@pytest.mark.parametrize(
    ("given", "name", "right"),
    [
        ({"guided_json": {"type": "object"}}, "guided_json", '{"type":"object"}'),
        ({"guided_regex": "a+"}, "guided_regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "guided_choice", ("a", "b")),
        ({"guided_grammar": 'root ::= "a"'}, "guided_grammar", 'root ::= "a"'),
        ({"structured_outputs": {"regex": "a+"}}, "guided_regex", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "guided_choice", ("a",)),
        ({"typical_p": 0.5}, "typical_p", 0.5),
        ({"use_beam_search": True, "best_of": 2}, "use_beam_search", True),
        ({"prompt_logprobs": 1}, "prompt_logprobs", 1),
        ({"truncate_prompt": True}, "truncate_prompt", True),
        ({"skip_special_tokens": False}, "skip_special_tokens", False),
    ],
)
def test_a_field_of_vllms_is_the_option_of_the_fabric(given: dict[str, Any], name: str, right: Any) -> None:
    request = decode(decoder(CompletionRequest), json.dumps({"model": "m", "prompt": "a", **given}).encode())
    made, _ = generate_request("a", completion_options(request))
    assert getattr(made.sampling, name) == right


@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier", "safety_identifier"])
def test_what_is_accepted_without_effect_is_no_option(name: str) -> None:
    value = {"metadata": {"a": "b"}, "store": True}.get(name, "x")
    request = decode(decoder(CompletionRequest), json.dumps({"model": "m", "prompt": "a", name: value}).encode())
    assert completion_options(request) == {"max_tokens": 16}
