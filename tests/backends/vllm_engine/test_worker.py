"""VLLMWorker without a fabric, on a tiny random model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.tiny import ask, reference
from tests.backends.vllm_engine.conftest import Served, operate, run
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import (
    ContextOverflowError,
    ParameterRangeError,
    RequestError,
)
from zfabric.wire.payloads import CountRequest, GenerateRequest
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.traces import TraceContext
from zfabric.worker.traces import within

pytestmark = pytest.mark.asyncio(loop_scope="package")

PROMPTS = ["Hello", "The quick brown fox jumps", "a", "Once upon a time there was", "é世界", "0123456789 " * 5]


def steps_of(worker: VLLMWorker) -> int:
    progress = worker.load_report().progress
    assert progress is not None
    return progress


async def test_a_batch_says_what_generate_says_one_by_one(served: Served, vllm_llama: Path) -> None:
    worker, answers = served
    names = [f"r{index}" for index in range(len(PROMPTS))]
    for index, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True)):
        worker.begin(ask(name, prompt, temperature=0, max_new_tokens=20 + 7 * index, ignore_eos=True))
        await answers.until(name, tokens=3)
    await answers.until(*names)
    for index, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True)):
        assert answers.tokens(name) == reference(vllm_llama, prompt, 20 + 7 * index)
        assert answers.last(name).finish_reason == "length"
        usage = answers.last(name).usage
        assert usage is not None
        assert usage.completion_tokens == 20 + 7 * index


async def test_a_step_is_one_call_however_many_streams(served: Served) -> None:
    """Of which vLLM's reader handles no more than 16 in one part, see conftest."""
    worker, answers = served
    before, calls = steps_of(worker), 0
    emit = answers.emit

    def counted(step: Any) -> None:
        nonlocal calls
        calls += 1
        emit(step)

    answers.emit = counted  # type: ignore[method-assign]
    names = [f"r{index}" for index in range(40)]
    await run(served, *(ask(name, "Hello", temperature=0, max_new_tokens=30, ignore_eos=True) for name in names))
    assert answers.largest_step == 40
    assert calls <= steps_of(worker) - before
    assert calls < 3 * 30
    assert all(len(answers.tokens(name)) == 30 for name in names)


async def test_plain_tokens_leave_as_columns_and_whatever_has_more_does_not(served: Served, vllm_llama: Path) -> None:
    answers = await run(
        served,
        ask("plain", temperature=0, max_new_tokens=12, ignore_eos=True),
        ask("scored", temperature=0, max_new_tokens=12, ignore_eos=True, logprobs=1),
        ask("two", temperature=1, seed=3, max_new_tokens=12, ignore_eos=True, n=2),
        ask("prompted", temperature=0, max_new_tokens=12, ignore_eos=True, prompt_logprobs=1),
    )
    assert answers.plain == {"plain": 11}
    assert (
        answers.tokens("plain")
        == answers.tokens("scored")
        == answers.tokens("prompted")
        == reference(vllm_llama, "Hello there", 12)
    )
    assert answers.text("plain") == answers.text("scored")


async def test_a_seed_gives_the_same_text_in_any_company(served: Served) -> None:
    answers = await run(served, ask("alone", seed=7, max_new_tokens=24, ignore_eos=True))
    company = [ask(f"c{n}", PROMPTS[n], seed=n, max_new_tokens=10 + n, ignore_eos=True) for n in range(5)]
    await run(served, *company, ask("together", seed=7, max_new_tokens=24, ignore_eos=True))
    assert answers.tokens("alone") == answers.tokens("together")
    await run(served, ask("other", seed=8, max_new_tokens=24, ignore_eos=True))
    assert answers.tokens("other") != answers.tokens("alone")
    minus = [ask(name, seed=-1, max_new_tokens=24, ignore_eos=True) for name in ("minus", "again")]
    await run(served, *minus)
    assert answers.tokens("minus") == answers.tokens("again")


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 1},
        {"temperature": 0, "frequency_penalty": 1.5, "logprobs": 1},
        {"temperature": 0, "echo": True},
        {"seed": 3},
        {"seed": 3, "echo": True, "stop": ("never to be seen",)},
    ],
    ids=lambda sampling: "-".join(sampling),
)
async def test_a_continuation_says_the_rest(served: Served, sampling: dict[str, Any]) -> None:
    whole = await run(served, ask("whole", max_new_tokens=12, ignore_eos=True, **sampling))
    tokens = whole.tokens("whole")
    shown, characters, requests = 0, 0, []
    for delta in whole.deltas["whole"]:
        shown += len(delta.token_ids)
        characters += len(delta.text)
        request = ask(
            f"from {shown} {characters}",
            max_new_tokens=12,
            ignore_eos=True,
            resume_token_ids=tokens[:shown],
            resume_characters=characters,
            **sampling,
        )
        requests.append(request)
    await run(served, *requests)
    for request in requests:
        name, shown = request.request_id, len(request.resume_token_ids)
        assert whole.tokens(name) == tokens[shown:]
        assert whole.text(name) == whole.text("whole")[request.resume_characters :]
        assert whole.last(name).finish_reason == "length"
        if "logprobs" in sampling:
            entries = [entry.token.token_id for delta in whole.deltas[name] for entry in delta.logprobs or ()]
            assert entries == tokens[shown:]
        usage = whole.last(name).usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (11, 12)


async def test_a_continuation_of_something_else_is_refused(served: Served) -> None:
    _, answers = served
    answers = await run(
        served, ask("r", seed=3, max_new_tokens=12, ignore_eos=True, resume_token_ids=[5, 5, 5], resume_characters=3)
    )
    assert "drawn again, it differs" in str(answers.errors["r"])


async def test_stop_strings_straddle_tokens(served: Served) -> None:
    answers = await run(served, ask("free", temperature=0, max_new_tokens=40, ignore_eos=True))
    text = answers.text("free")
    stop = next(text[at : at + 3] for at in range(5, len(text)) if len(text[at : at + 3]) == 3)
    await run(served, ask("stopped", temperature=0, max_new_tokens=40, ignore_eos=True, stop=(stop,)))
    assert answers.text("stopped") == text[: text.index(stop)]
    assert (answers.last("stopped").finish_reason, answers.last("stopped").stop_reason) == ("stop", stop)
    # The end got lost, and only that is asked for.
    drawn = answers.tokens("stopped")
    again = ask(
        "again", temperature=0, max_new_tokens=40, ignore_eos=True, stop=(stop,), resume_token_ids=drawn,
        resume_characters=len(answers.text("stopped")),
    )  # fmt: skip
    await run(served, again)
    assert (answers.text("again"), answers.tokens("again")) == ("", [])
    assert answers.last("again").finish_reason == "stop"


async def test_stop_tokens_and_least_length(served: Served) -> None:
    answers = await run(served, ask("free", temperature=0, max_new_tokens=10, ignore_eos=True))
    token = answers.tokens("free")[2]
    first = answers.tokens("free").index(token)
    await run(served, ask("stopped", temperature=0, max_new_tokens=10, ignore_eos=True, stop_token_ids=(token,)))
    assert answers.tokens("stopped") == answers.tokens("free")[: first + 1]
    assert answers.last("stopped").finish_reason == "stop"
    longer = ask("longer", temperature=0, max_new_tokens=10, ignore_eos=True, stop_token_ids=(token,), min_new_tokens=8)
    await run(served, longer)
    assert len(answers.tokens("longer")) >= 8


async def test_logprobs_are_those_of_the_model(served: Served, vllm_llama: Path) -> None:
    answers = await run(
        served,
        ask(
            "a", temperature=0, max_new_tokens=5, logprobs=3, prompt_logprobs=1, ignore_eos=True, frequency_penalty=1.0
        ),
    )
    entries = [entry for delta in answers.deltas["a"] for entry in delta.logprobs or ()]
    prompt = [entry for delta in answers.deltas["a"] for entry in delta.prompt_logprobs or ()]
    tokenizer = AutoTokenizer.from_pretrained(vllm_llama)
    model = AutoModelForCausalLM.from_pretrained(vllm_llama, dtype=torch.float32)
    ids = tokenizer("Hello there")["input_ids"]
    tokens = answers.tokens("a")
    with torch.inference_mode():
        logp = model(torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
    assert len(entries) == 5
    for position, entry in enumerate(entries):
        at = logp[len(ids) - 1 + position]
        assert entry.token.token_id == tokens[position]
        assert entry.token.logprob == pytest.approx(at[tokens[position]].item(), abs=1e-3)
        assert [other.token_id for other in entry.top] == at.topk(3).indices.tolist()
    assert len(prompt) == len(ids)
    assert prompt[0] is None
    for position, known in enumerate(prompt[1:], start=1):
        assert known is not None
        assert known.token.logprob == pytest.approx(logp[position - 1][ids[position]].item(), abs=1e-3)
        assert len(known.top) == 1


async def test_no_alternatives_are_none(served: Served) -> None:
    answers = await run(served, ask("a", temperature=0, max_new_tokens=3, logprobs=0, ignore_eos=True))
    entries = [entry for delta in answers.deltas["a"] for entry in delta.logprobs or ()]
    assert [entry.top for entry in entries] == [[], [], []]


async def test_choices_share_a_prompt_and_differ(served: Served) -> None:
    answers = await run(served, ask("n", "Say", n=3, seed=1, max_new_tokens=12, ignore_eos=True, echo=True))
    texts = [answers.tokens("n", index) for index in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    assert all(len(text) == 12 for text in texts)
    assert all(answers.text("n", index).startswith("Say") for index in range(3))
    usage = answers.last("n").usage
    assert usage is not None
    assert usage.completion_tokens == 36
    assert sum(delta.finish_reason is not None for delta in answers.deltas["n"]) == 3


async def test_biases_and_bad_words_are_honoured(served: Served) -> None:
    biased = ask("biased", temperature=0, max_new_tokens=4, logit_bias={40: 100.0}, ignore_eos=True)
    answers = await run(served, biased, ask("free", temperature=0, max_new_tokens=10, ignore_eos=True))
    assert answers.tokens("biased") == [40] * 4
    word = next(character for character in answers.text("free") if character.isascii() and character.isprintable())
    await run(served, ask("without", temperature=0, max_new_tokens=10, ignore_eos=True, bad_words=(word,)))
    assert word not in answers.text("without")


@pytest.mark.parametrize(
    ("guide", "allowed"),
    [
        ({"guided_choice": ("yes", "no")}, {"yes", "no"}),
        ({"guided_regex": "a{3}"}, {"aaa"}),
        ({"guided_json": '{"enum": ["left", "right"]}'}, {'"left"', '"right"'}),
        ({"guided_grammar": 'root ::= "up" | "down"'}, {"up", "down"}),
    ],
    ids=["choice", "regex", "json", "grammar"],
)
async def test_guides_constrain_the_text(served: Served, guide: dict[str, Any], allowed: set[str]) -> None:
    answers = await run(served, ask("g", max_new_tokens=20, **guide))
    assert answers.text("g") in allowed
    assert answers.last("g").finish_reason == "stop"


async def test_a_response_format_is_a_guide(served: Served) -> None:
    request = GenerateRequest(
        prompt="x",
        request_id="f",
        response_format={"type": "json_schema", "json_schema": {"name": "d", "schema": {"enum": ["left", "right"]}}},
        sampling=SamplingParams(max_new_tokens=20),
    )
    answers = await run(served, request)
    assert answers.text("f") in {'"left"', '"right"'}


async def test_an_aborted_request_is_gone_within_a_step(served: Served) -> None:
    worker, answers = served
    names = [f"long{index}" for index in range(8)]
    for name in names:
        worker.begin(ask(name, max_new_tokens=480, temperature=0, ignore_eos=True))
    await answers.until(*names, tokens=3)
    for name in names:
        worker.abort(name)
    seen = {name: len(answers.tokens(name)) for name in names}
    await run(served, ask("next", temperature=0, max_new_tokens=5, ignore_eos=True))
    await run(served, ask("last", temperature=0, max_new_tokens=20, ignore_eos=True))
    assert {name: len(answers.tokens(name)) for name in names} == seen
    assert max(seen.values()) < 480
    gauges = worker.load_report().gauges
    assert (gauges["running"], gauges["kv_cache_use"]) == (0, 0)


async def test_a_request_aborted_at_once_never_runs(served: Served) -> None:
    worker, answers = served
    worker.begin(ask("early", "x" * 300, temperature=0, max_new_tokens=100, ignore_eos=True))
    worker.abort("early")
    worker.begin(ask("turn", "x" * 300, temperature=0, max_new_tokens=100, ignore_eos=True))
    await asyncio.sleep(0)
    worker.abort("turn")
    worker.abort("unknown")
    await run(served, ask("next", temperature=0, max_new_tokens=5, ignore_eos=True))
    assert answers.deltas.keys() == {"next"}


async def test_the_engine_goes_on_with_a_requests_trace(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, answers = served
    engine, given = worker._served().engine, []
    add_request = engine.add_request

    async def noted(*arguments: Any, **named: Any) -> Any:
        given.append(named["trace_headers"])
        return await add_request(*arguments, **named)

    monkeypatch.setattr(engine, "add_request", noted)
    context = TraceContext(1, 2)
    with within(context, None):
        worker.begin(ask("traced", temperature=0, max_new_tokens=2))
    worker.begin(ask("plain", temperature=0, max_new_tokens=2))
    await answers.until("traced", "plain")
    assert given == [context.headers, None]


async def test_requests_that_cannot_be_served_say_why(served: Served) -> None:
    answers = await run(
        served,
        ask("long", "x" * 600),
        ask("many", "x", logprobs=21),
        GenerateRequest(prompt_token_ids=[1, 100_000], request_id="unknown"),
        ask("grammar", guided_json="{]"),
        ask("cut", "x" * 600, truncate_prompt=True, max_new_tokens=1, ignore_eos=True, echo=True),
    )
    error = answers.errors["long"]
    assert isinstance(error, ContextOverflowError)
    assert error.details["context_length"] == 512
    assert isinstance(answers.errors["many"], ParameterRangeError)
    assert isinstance(answers.errors["unknown"], RequestError)
    assert isinstance(answers.errors["grammar"], RequestError)
    assert answers.text("cut").startswith("x" * 511)
    usage = answers.last("cut").usage
    assert usage is not None
    assert usage.prompt_tokens == 511


async def test_messages_go_through_the_template(served: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    sampling = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    chat = GenerateRequest(messages=messages, request_id="chat", sampling=sampling)
    answers = await run(
        served, chat, ask("plain", "<user>hi\n<assistant>", temperature=0, max_new_tokens=6, ignore_eos=True)
    )
    assert answers.tokens("chat") == answers.tokens("plain")
    worker, _ = served
    assert await worker.count_tokens(CountRequest(messages=messages)) == len("<user>hi\n<assistant>")


async def test_beats_tell_of_the_engine(served: Served) -> None:
    worker, answers = served
    prompt = "a prefix that is long enough for blocks of the cache to be found again, twice over"
    await operate(worker, "reset_prefix_cache")
    before = worker.load_report().gauges
    await run(served, ask("first", prompt, temperature=0, max_new_tokens=2, ignore_eos=True))
    worker.begin(ask("second", prompt, temperature=0, max_new_tokens=200, ignore_eos=True))
    await answers.until("second", tokens=20)
    running = worker.load_report()
    assert running.gauges["running"] == 1
    assert running.gauges["kv_cache_use"] > 0
    assert running.kv_blocks_free is not None
    await answers.until("second")
    usage = answers.last("second").usage
    assert usage is not None
    assert usage.cached_tokens == 64
    after = worker.load_report()
    assert after.gauges["prefix_cache_hits"] - before["prefix_cache_hits"] == 64
    assert after.gauges["steps"] >= before["steps"] + 200
    assert after.kv_blocks_free is not None
    assert after.kv_blocks_free > running.kv_blocks_free


async def test_no_metrics_are_kept_that_nobody_can_read(served: Served) -> None:
    worker, _ = served
    await run(served, ask("a", temperature=0, max_new_tokens=5, ignore_eos=True))
    assert worker.load_report().gauges["steps"] > 0
    counted = [
        sample.value
        for metric in prometheus_client.REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith("vllm:") and sample.name.endswith("tokens_total")
    ]
    assert not any(counted)
