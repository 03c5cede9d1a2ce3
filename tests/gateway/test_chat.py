"""/v1/chat/completions, as OpenAI's client sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.gateway.backends import Broken, Caller, Recorder
from tests.gateway.conftest import gateway
from zfabric.backends.echo import EchoOptions, EchoWorker

HELLO: list[Any] = [{"role": "user", "content": "one two three"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


async def test_a_whole_answer() -> None:
    async with gateway(EchoWorker()) as served:
        answer = await served.openai.chat.completions.create(model="echo", messages=HELLO, max_tokens=4)
        assert answer.choices[0].message.content == "one two three one "
        assert answer.choices[0].message.role == "assistant"
        assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "echo", "length")
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)


async def test_without_a_length_an_answer_takes_what_the_context_leaves() -> None:
    recorder = Recorder()
    async with gateway(recorder) as served:
        await served.openai.chat.completions.create(model="recorder", messages=HELLO)
        await served.openai.chat.completions.create(model="recorder", messages=HELLO, max_completion_tokens=5)
        assert [request.sampling.max_new_tokens for request in recorder.requests] == [None, 5]


async def test_a_stream_is_the_same_text_token_by_token() -> None:
    async with gateway(EchoWorker(EchoOptions(tokens_per_second=200))) as served:
        stream = await served.openai.chat.completions.create(
            model="echo", messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "one two three one two three "
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk.id for chunk in chunks}) == 1
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 6
        assert {chunk.usage for chunk in chunks[:-1]} == {None}


async def test_the_blocking_client_reads_a_stream() -> None:
    async with gateway(EchoWorker()) as served:

        def read() -> str:
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
                stream = client.chat.completions.create(model="echo", messages=HELLO, max_tokens=4, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        assert await asyncio.to_thread(read) == "one two three one "


async def test_many_streams_at_once_keep_apart() -> None:
    async with gateway(EchoWorker()) as served:

        async def ask(number: int) -> str:
            messages: list[Any] = [{"role": "user", "content": f"w{number} x"}]
            stream = await served.openai.chat.completions.create(
                model="echo", messages=messages, max_tokens=40, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        texts = await asyncio.gather(*(ask(number) for number in range(64)))
        assert texts == [f"w{number} x " * 20 for number in range(64)]


async def test_tool_calls_and_reasoning_in_a_stream() -> None:
    async with gateway(Caller()) as served:
        stream = await served.openai.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS, stream=True)
        reasoning, text, reasons = "", "", []
        calls: dict[int, dict[str, Any]] = {}
        async for chunk in stream:
            choice = chunk.choices[0]
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for piece in choice.delta.tool_calls or ():
                assert piece.function is not None
                call = calls.setdefault(piece.index, {"id": piece.id, "name": piece.function.name, "arguments": ""})
                call["arguments"] += piece.function.arguments or ""
        assert (reasoning, text, reasons[-1]) == ("hm, weather", "Let me look.", "tool_calls")
        assert list(calls.values()) == [
            {"id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}'},
            {"id": "call_2", "name": "time", "arguments": "{}"},
        ]


async def test_openais_own_accumulator_puts_a_stream_together() -> None:
    async with (
        gateway(Caller()) as served,
        served.openai.chat.completions.stream(model="caller", messages=HELLO, tools=TOOLS) as stream,
    ):
        answer = await stream.get_final_completion()
        calls = answer.choices[0].message.tool_calls
        assert calls is not None
        [first, second] = calls
        assert (first.function.name, first.function.arguments) == ("weather", '{"city": "Oslo"}')
        assert (second.id, second.type) == ("call_2", "function")


async def test_tool_calls_whole_and_their_results_sent_back() -> None:
    async with gateway(Caller()) as served:
        answer = await served.openai.chat.completions.create(model="caller", messages=HELLO, tools=TOOLS)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.content == "Let me look."
        assert message.model_extra == {"reasoning_content": "hm, weather"}
        assert [call.id for call in message.tool_calls or ()] == ["call_1", "call_2"]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        back: list[Any] = [*HELLO, message, {"role": "tool", "tool_call_id": "call_1", "content": "cold"}]
        again = await served.openai.chat.completions.create(
            model="caller", messages=back, tools=TOOLS, tool_choice="none"
        )
        assert again.choices[0].message.content == "no tools"


async def test_an_answer_of_calls_alone_is_sent_back_without_content() -> None:
    recorder = Recorder()
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    async with gateway(recorder) as served:
        for given in ({}, {"content": None}):
            back: list[Any] = [*HELLO, {"role": "assistant", "tool_calls": [call], **given}]
            await served.openai.chat.completions.create(model="recorder", messages=back)
    assert [request.messages[-1] for request in recorder.requests if request.messages] == [
        {"role": "assistant", "tool_calls": [call], "content": ""}
    ] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_with_log_probabilities(stream: bool) -> None:
    async with gateway(Recorder()) as served:
        options: Any = {"model": "recorder", "messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 1}
        found: dict[int, list[Any]] = {0: [], 1: []}
        if stream:
            async for chunk in await served.openai.chat.completions.create(**options, stream=True):
                choice = chunk.choices[0]
                if choice.logprobs is not None:
                    found[choice.index] += choice.logprobs.content or ()
        else:
            for one in (await served.openai.chat.completions.create(**options)).choices:
                found[one.index] = one.logprobs.content
        for entries in found.values():
            assert [entry.token for entry in entries] == ["gr", "ün", ""]
            assert entries[1].bytes == list("ün".encode())
            assert [len(entry.top_logprobs) for entry in entries] == [1, 1, 0]
            assert entries[0].top_logprobs[0].logprob == -0.5


async def test_every_field_reaches_the_backend() -> None:
    recorder = Recorder()
    async with gateway(recorder) as served:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        await served.openai.chat.completions.create(
            model="recorder",
            messages=[{"role": "developer", "content": "Be brief."}, *HELLO],
            temperature=0.5, top_p=0.9, seed=7, stop=["x"], presence_penalty=0.1, frequency_penalty=0.2,
            logit_bias={"5": -1}, max_completion_tokens=9, user="u", store=False, metadata={"a": "b"},
            extra_body={
                "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True, "priority": 5,
                "stop_token_ids": [4], "bad_words": ["y"], "skip_special_tokens": False,
                "structured_outputs": {"json": schema},
            },
        )  # fmt: skip
        [request] = recorder.requests
        assert request.messages == [{"role": "system", "content": "Be brief."}, *HELLO]
        assert request.priority == 5
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0.5, 0.9, 7, ("x",))
        assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (0.1, 0.2, {5: -1})
        assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.top_k, sampling.min_p) == (9, 2, 3, 0.1)
        assert (sampling.repetition_penalty, sampling.ignore_eos, sampling.stop_token_ids) == (1.1, True, (4,))
        assert (sampling.bad_words, sampling.skip_special_tokens) == (("y",), False)
        assert json.loads(sampling.guided_json or "") == schema


async def test_what_a_template_is_told_reaches_the_backend() -> None:
    recorder = Recorder()
    begun: list[Any] = [*HELLO, {"role": "assistant", "content": "Well"}]
    documents = [{"title": "a", "text": "b"}]
    extra = {
        "chat_template_kwargs": {"enable_thinking": False}, "documents": documents,
        "add_generation_prompt": False, "continue_final_message": True,
    }  # fmt: skip
    async with gateway(recorder) as served:
        create = served.openai.chat.completions.create
        await create(model="recorder", messages=begun, reasoning_effort="low", extra_body=extra)
        usual = {"add_generation_prompt": True, "continue_final_message": False}
        await create(model="recorder", messages=HELLO, extra_body=usual)
        told, plain = (request.chat for request in recorder.requests)
        assert told is not None
        assert told.chat_template_kwargs == {"reasoning_effort": "low", "enable_thinking": False}
        assert (told.documents, told.continue_final_message, told.add_generation_prompt) == (documents, True, False)
        assert plain is None


async def test_a_schema_from_a_class_reaches_the_backend() -> None:
    class Pair(BaseModel):
        a: int

    recorder = Recorder()
    async with gateway(recorder) as served:
        with pytest.raises(ValueError, match="JSON"):  # the recorder answers no JSON, which the client finds
            await served.openai.chat.completions.parse(model="recorder", messages=HELLO, response_format=Pair)
        wanted = recorder.requests[0].response_format
        assert wanted is not None
        assert wanted["json_schema"]["schema"]["required"] == ["a"]


async def test_a_picture_reaches_the_backend_as_it_was_sent() -> None:
    recorder = Recorder()
    content: list[Any] = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
    ]
    async with gateway(recorder) as served:
        await served.openai.chat.completions.create(model="recorder", messages=[{"role": "user", "content": content}])
        assert recorder.requests[0].messages == [{"role": "user", "content": content}]


async def test_token_ids_where_they_are_asked_for() -> None:
    async with gateway(Recorder()) as served:
        options: Any = {"model": "recorder", "messages": HELLO, "extra_body": {"return_token_ids": True}}
        answer = await served.openai.chat.completions.create(**options)
        assert answer.choices[0].model_extra == {"token_ids": [7, 8, 2]}
        stream = await served.openai.chat.completions.create(**options, stream=True)
        ids = [token async for chunk in stream for token in (chunk.choices[0].model_extra or {}).get("token_ids", ())]
        assert ids == [7, 8, 2]


async def test_counts_in_every_event_of_a_stream() -> None:
    async with gateway(EchoWorker()) as served:
        wanted: Any = {"include_usage": True, "continuous_usage_stats": True}
        chat = await served.openai.chat.completions.create(
            model="echo", messages=HELLO, max_tokens=3, stream=True, stream_options=wanted
        )
        told: list[Any] = [chunk.usage async for chunk in chat]
        assert {usage.prompt_tokens for usage in told} == {told[-1].prompt_tokens}
        made = [usage.completion_tokens for usage in told]
        assert (made[0], made[-1], made) == (0, 3, sorted(made))
        prompts: Any = ["a b", [5]]
        old = await served.openai.completions.create(
            model="echo", prompt=prompts, max_tokens=3, stream=True, stream_options=wanted
        )
        ends = [
            (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            async for chunk in old
            if chunk.usage and chunk.choices and chunk.choices[0].finish_reason
        ]
        assert sorted(ends) == [(1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"temperature": 1_000}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"stream_options": {"wrong": 1}, "stream": True}, "stream_options.wrong"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"messages": [{"content": "who?"}]}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"chat_template": "x"}, "chat_template"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
async def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], parameter: str) -> None:
    async with gateway(EchoWorker()) as served:
        with pytest.raises(openai.BadRequestError) as refused:
            await served.openai.chat.completions.create(model="echo", messages=HELLO, extra_body=change)
        assert refused.value.param == parameter
        assert refused.value.type == "invalid_request_error"


async def test_what_a_model_cannot_do_is_refused_by_name() -> None:
    async with gateway(EchoWorker()) as served:
        with pytest.raises(openai.BadRequestError) as refused:
            await served.openai.chat.completions.create(model="echo", messages=HELLO, top_p=0.5)
        assert (refused.value.param, refused.value.code) == ("top_p", "unsupported_parameter")


async def test_errors_have_the_status_that_openais_client_knows() -> None:
    async with gateway(EchoWorker(EchoOptions(context_length=2)), Broken()) as served:
        with pytest.raises(openai.NotFoundError) as missing:
            await served.openai.chat.completions.create(model="nobody", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            await served.openai.chat.completions.create(model="echo", messages=HELLO, stream=True)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
        assert "this model's maximum context length is 2 tokens" in long.value.message
        with pytest.raises(openai.InternalServerError) as broken:
            await served.openai.chat.completions.create(model="broken", messages=HELLO, stream=True)
        assert broken.value.status_code == 500
        assert [event for event, _ in served.logged].count("request_failed") == 1


async def test_an_error_after_the_first_word_ends_the_stream_with_it() -> None:
    async with gateway(Broken()) as served:
        later: list[Any] = [{"role": "user", "content": "later"}]
        stream = await served.openai.chat.completions.create(model="broken", messages=later, stream=True)
        first, second = await anext(stream), await anext(stream)
        assert (first.choices[0].delta.role, second.choices[0].delta.content) == ("assistant", "begun ")
        with pytest.raises(openai.APIError, match="the engine failed"):
            await anext(stream)
