"""Tool calls and reasoning that every backend which makes its own text has to tell apart alike: one script, and what is in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.backends.scripted import prompt_tokens, save_scripted, tokenizer
from tests.backends.tiny import Answers
from tests.parsing.outputs import TOOLS
from tests.parsing.test_formats import Seen
from zfabric.errors import RequestError
from zfabric.wire.chat import ChatOptions
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

USER: Any = {"role": "user", "content": "How is the weather?"}
#: Where there are no tools. Its script begins after the others, since places alone tell what is written.
ALONE: Any = {"role": "user", "content": "How is the weather? " * 17}
THOUGHT = "Paris, é?"
ARGUMENTS = '{"city": "Çeşme", "days": 3}'
CALLS = (
    f'Yes.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
SCRIPT = f"<think>\n{THOUGHT}\n</think>\n\n{CALLS}"
#: Has a thought end at once; the answer's own guide leaves no other choice.
_END_THOUGHT = {tokenizer().convert_tokens_to_ids("</think>"): 100.0}
RESULTS = [("get_weather", '{"sun": true}'), ("now", "12:00")]
ANSWER = "Sun at noon."


def second_turn(message: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The chat after the results of calls."""
    results = [
        {"role": "tool", "tool_call_id": name, "content": content}
        for name, (_, content) in zip(names, RESULTS, strict=True)
    ]
    return [USER, message, *results]


def save_calling(directory: Path) -> Path:
    """The model: it thinks and calls, and answers when it has the results."""
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("get_weather", json.loads(ARGUMENTS)), ("now", {}))
    ]
    turn = second_turn({"role": "assistant", "content": "Yes.", "tool_calls": calls}, ["a", "b"])
    scripts = {
        len(prompt_tokens([USER], tools=TOOLS)): SCRIPT,
        len(prompt_tokens(turn, tools=TOOLS)): ANSWER,
        len(prompt_tokens([ALONE])): "It " + CALLS,
    }
    return save_scripted(directory, scripts)


def ask_with_tools(
    request_id: str = "1-1-0", *, tools: Sequence[dict[str, Any]] = TOOLS, **options: Any
) -> GenerateRequest:
    """A request to that model."""
    names = ("tool_choice", "parallel_tool_calls", "chat_template_kwargs")
    chat = {name: options.pop(name) for name in names if name in options}
    resumed = {name: options.pop(name) for name in ("resume_token_ids", "resume_characters") if name in options}
    return GenerateRequest(
        messages=[USER if tools else ALONE],
        tools=list(tools) or None,
        request_id=request_id,
        chat=ChatOptions(**chat) if chat else None,
        sampling=SamplingParams(**{"temperature": 0, "max_new_tokens": 300, **options}),
        **resumed,
    )


def seen_of(answers: Answers, name: str, index: int = 0) -> Seen:
    """What a reader has of an answer."""
    seen = Seen()
    for delta in answers.deltas[name]:
        if delta.index == index:
            seen.take(delta)
    return seen


async def answered(served: tuple[Any, Answers], request: GenerateRequest) -> Seen:
    """The answer of a worker."""
    worker, answers = served
    answers.deltas.pop(request.request_id, None)
    answers.errors.pop(request.request_id, None)
    worker.begin(request)
    await asyncio.wait_for(answers.until(request.request_id), 60)
    if request.request_id in answers.errors:
        raise answers.errors[request.request_id]
    return seen_of(answers, request.request_id)


def check_whole(seen: Seen) -> None:
    """All of the script, told apart."""
    assert (seen.reasoning, seen.text, seen.reason) == (THOUGHT, "Yes.", "tool_calls")
    assert [call.name for call in seen.calls] == ["get_weather", "now"]
    assert [call.arguments for call in seen.calls] == [ARGUMENTS, "{}"]


async def check_worker(served: tuple[Any, Answers]) -> None:
    """What a reader of any backend gets of that model."""
    answers = served[1]
    whole = await answered(served, ask_with_tools())
    check_whole(whole)
    pieces = [piece for delta in answers.deltas["1-1-0"] for piece in delta.tool_calls or ()]
    assert len(pieces) > 2, "arguments come bit by bit: there are more pieces than calls"
    usage = answers.last("1-1-0").usage
    assert usage is not None
    assert usage.completion_tokens == len(answers.tokens("1-1-0"))
    plain = await answered(served, ask_with_tools(tools=()))
    assert (plain.text, plain.calls, plain.reason) == (
        "It " + CALLS.replace("<tool_call>", "").replace("</tool_call>", ""),
        [],
        "stop",
    )
    first = await answered(served, ask_with_tools(parallel_tool_calls=False))
    assert [call.name for call in first.calls] == ["get_weather"]
    stopped = await answered(served, ask_with_tools(stop=("now",)))
    assert [call.name for call in stopped.calls] == ["get_weather"]
    assert stopped.reason in ("stop", "tool_calls")
    cut = await answered(served, ask_with_tools(max_new_tokens=90))
    assert (cut.reason, cut.reasoning, cut.text) == ("length", THOUGHT, "Yes.")
    assert ARGUMENTS.startswith(cut.calls[0].arguments)
    shown = await answered(served, ask_with_tools(skip_special_tokens=False))
    assert [call.arguments for call in shown.calls] == [ARGUMENTS, "{}"]
    scored = await answered(served, ask_with_tools(logprobs=1))
    check_whole(scored)
    assert all(len(delta.logprobs or ()) == len(delta.token_ids) for delta in answers.deltas["1-1-0"])
    await answered(served, ask_with_tools(n=2, temperature=1, logit_bias={}))
    for index in range(2):
        ids = {call.id for call in seen_of(answers, "1-1-0", index).calls}
        assert len(ids) == 2
    echoed = await answered(served, ask_with_tools(echo=True))
    assert echoed.text.endswith("assistant\nYes.")
    assert echoed.calls == whole.calls


async def check_resumed(served: tuple[Any, Answers], **options: Any) -> None:
    """Broken off after any token, an answer goes on as it would have."""
    answers = served[1]
    whole = await answered(served, ask_with_tools(**options))
    deltas = answers.deltas["1-1-0"]
    counts = [*range(1, len(deltas) - 1, 11), len(deltas) - 2]
    first: dict[str, Seen] = {}
    for count in counts:
        name = f"1-1-{count}"
        first[name] = seen = Seen()
        for delta in deltas[:count]:
            seen.take(delta)
        tokens = [token for delta in deltas[:count] for token in delta.token_ids]
        again = ask_with_tools(name, resume_token_ids=tokens, resume_characters=seen.characters, **options)
        served[0].begin(again)
    await asyncio.wait_for(answers.until(*first), 120)
    assert not answers.errors
    for name, seen in first.items():
        for delta in answers.deltas.pop(name):
            seen.take(delta)
        assert seen == whole, name


async def check_forced(served: tuple[Any, Answers]) -> None:
    """Calls that are asked for are made, whatever the model would say; so is what else a guide asks for, after the thought."""
    one = await answered(served, ask_with_tools(tools=TOOLS[1:], tool_choice="required", parallel_tool_calls=False))
    chosen = {"type": "function", "function": {"name": "now"}}
    named = await answered(served, ask_with_tools(tool_choice=chosen))
    for seen in (one, named):
        assert [(call.name, json.loads(call.arguments)) for call in seen.calls] == [("now", {})]
        assert (seen.text, seen.reasoning, seen.reason) == ("", "", "tool_calls")
        assert all(call.id for call in seen.calls)
    thought = ask_with_tools(chat_template_kwargs={"thinking": True}, guided_choice=("one",), logit_bias=_END_THOUGHT)
    seen = await answered(served, thought)
    assert (seen.text, seen.reason) == ("one", "stop")
    again = ask_with_tools(
        tools=TOOLS[1:],
        chat_template_kwargs={"thinking": True},
        tool_choice=chosen,
        logit_bias=_END_THOUGHT,
    )
    seen = await answered(served, again)
    assert [(call.name, json.loads(call.arguments), seen.text) for call in seen.calls] == [("now", {}, "")]
    with pytest.raises(RequestError, match="guided_regex"):
        await answered(served, ask_with_tools(tool_choice="required", guided_regex="a"))
