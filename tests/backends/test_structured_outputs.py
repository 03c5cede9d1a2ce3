"""Guided answers: whatever a random model would say, its text follows the schema, expression, choice or grammar."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.backends.test_engine import Served
from tests.backends.tiny import Answers, ask
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.request import structured_outputs
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import BackendError, FabricError, ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


async def say(served: Served, name: str, **sampling: Any) -> str:
    worker, answers = served
    worker.begin(ask(name, **{"max_new_tokens": 200, **sampling}))
    await answers.until(name)
    if name in answers.errors:
        raise answers.errors[name]
    return answers.text(name)


@pytest.mark.parametrize("seed", range(4))
async def test_json_follows_its_schema(tiny_worker: Served, seed: int) -> None:
    found = json.loads(await say(tiny_worker, "a", seed=seed, guided_json=json.dumps(SCHEMA)))
    assert set(found) == {"name", "age", "tags"}
    assert len(found["name"]) <= 8
    assert 0 <= found["age"] <= 150
    assert set(found["tags"]) <= {"a", "b"}
    assert tiny_worker[1].last("a").finish_reason == "stop"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 1, "ignore_eos": True}, {"seed": 2, "n": 2}])
async def test_texts_match_their_expression(tiny_worker: Served, sampling: dict[str, Any]) -> None:
    await say(tiny_worker, "a", guided_regex=r"[a-f]{3}-[0-9]{2,4}", **sampling)
    for index in range(sampling.get("n", 1)):
        assert re.fullmatch(r"[a-f]{3}-[0-9]{2,4}", tiny_worker[1].text("a", index))


async def test_one_of_the_choices_is_said(tiny_worker: Served) -> None:
    choices = ("yes", 'no, "never"', "é\n世界")
    assert {await say(tiny_worker, f"{n}", seed=n, temperature=100.0, guided_choice=choices) for n in range(12)} == set(
        choices
    )


async def test_a_grammar_is_followed(tiny_worker: Served) -> None:
    grammar = 'start: "(" start ")" | "x"'
    assert re.fullmatch(r"\(*x\)*", await say(tiny_worker, "a", seed=3, guided_grammar=grammar))


async def test_guides_keep_to_their_own_rows(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    free = await say(tiny_worker, "free", temperature=0, max_new_tokens=30, ignore_eos=True)
    worker.begin(ask("guided", seed=1, guided_regex="[ab]{40}"))
    worker.begin(ask("again", temperature=0, max_new_tokens=30, ignore_eos=True))
    await answers.until("guided", "again")
    assert answers.text("again") == free
    assert re.fullmatch("[ab]{40}", answers.text("guided"))


async def test_a_continuation_follows_on(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    whole = await say(tiny_worker, "whole", seed=5, guided_json=json.dumps(SCHEMA))
    tokens = answers.tokens("whole")
    half = len(tokens) // 2
    shown = len(worker._assembled.loaded.tokenizer.decode(tokens[:half]))  # type: ignore[union-attr]
    await say(
        tiny_worker, "rest", seed=5, guided_json=json.dumps(SCHEMA), resume_token_ids=tokens[:half],
        resume_characters=shown,
    )  # fmt: skip
    assert answers.text("rest") == whole[shown:]


@pytest.mark.parametrize(
    ("sampling", "error"),
    [
        ({"guided_json": "{"}, ParameterRangeError),
        ({"guided_json": '{"type": "objct"}'}, ParameterRangeError),
        ({"guided_regex": "((("}, ParameterRangeError),
        ({"guided_grammar": "nothing"}, ParameterRangeError),
        ({"guided_regex": "[ab]+", "bad_words": ("a", "b"), "max_new_tokens": 4}, RequestError),
    ],
)
async def test_what_cannot_be_followed_costs_its_request_alone(
    tiny_worker: Served, sampling: dict[str, Any], error: type[FabricError]
) -> None:
    with pytest.raises(error):
        await say(tiny_worker, "a", **sampling)
    assert await say(tiny_worker, "b", guided_regex="ok") == "ok"


async def test_a_guide_that_gives_up_costs_its_request_alone(
    tiny_worker: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own state of error, met at the first mask of a batch of three."""
    worker, answers = tiny_worker
    make = structured_outputs.StructuredOutputs.make

    def made(self: structured_outputs.StructuredOutputs, request: GenerateRequest) -> structured_outputs.Guide | None:
        guide = make(self, request)
        if guide is not None and request.sampling.seed == 13:
            guide.matcher.consume_token(2)
        return guide

    monkeypatch.setattr(structured_outputs.StructuredOutputs, "make", made)
    for name, seed in (("a", 1), ("bad", 13), ("b", 2)):
        worker.begin(ask(name, seed=seed, guided_regex="[ab]{20}"))
    await answers.until("a", "bad", "b")
    assert re.fullmatch("[ab]{20}", answers.text("a"))
    assert re.fullmatch("[ab]{20}", answers.text("b"))
    assert isinstance(answers.errors["bad"], BackendError)
    assert "gave up" in answers.errors["bad"].message


@pytest.mark.parametrize(
    "form", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}]
)
async def test_response_formats_are_guides(tiny_worker: Served, form: dict[str, Any]) -> None:
    worker, answers = tiny_worker
    request = GenerateRequest(
        prompt="x", request_id="a", response_format=form, sampling=SamplingParams(seed=4, max_new_tokens=400)
    )
    worker.begin(request)
    await answers.until("a")
    if answers.last("a").finish_reason == "stop":
        assert isinstance(json.loads(answers.text("a")), dict)
    else:
        assert answers.text("a").startswith("{")
    worker.begin(GenerateRequest(prompt="x", request_id="b", response_format={"type": "poem"}))
    await answers.until("b")
    assert isinstance(answers.errors["b"], RequestError)


async def test_without_the_library_guides_are_refused_by_name(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured_outputs, "guidable", lambda _: False)
    worker = ModelWorker(TransformersOptions(model=str(tiny_llama), device="cpu"))
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    worker.begin(ask("a", guided_regex="x"))
    await answers.until("a")
    await worker.close()
    assert not set(info.parameters or ()) & structured_outputs.GUIDED
    assert isinstance(answers.errors["a"], UnsupportedParameterError)
    assert answers.errors["a"].details["parameter"] == "guided_regex"


async def test_of_the_best_the_likeliest_are_given(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    common: dict[str, Any] = {"seed": 9, "max_new_tokens": 10, "ignore_eos": True}
    await say(tiny_worker, "all", n=5, logprobs=0, **common)
    likelihood = {
        index: sum(e.token.logprob for d in answers.deltas["all"] if d.index == index for e in d.logprobs or ())
        for index in range(5)
    }
    best = sorted(likelihood, key=lambda index: -likelihood[index])[:2]
    await say(tiny_worker, "best", n=2, best_of=5, **common)
    assert [answers.tokens("best", index) for index in range(2)] == [answers.tokens("all", index) for index in best]
    assert [answers.text("best", index) for index in range(2)] == [answers.text("all", index) for index in best]
    assert [delta.logprobs for delta in answers.deltas["best"]] == [None, None]
    assert [delta.finish_reason for delta in answers.deltas["best"]] == ["length", "length"]
    await say(tiny_worker, "told", n=1, best_of=3, logprobs=1, prompt_logprobs=0, **common)
    (told,) = answers.deltas["told"]
    assert [len(entry.top) for entry in told.logprobs or ()] == [1] * 10
    assert told.prompt_logprobs is not None
    assert told.usage is not None
    assert told.usage.completion_tokens == 30
    worker.begin(ask("dropped", n=1, best_of=3, **common))
    worker.abort("dropped")
    await asyncio.sleep(0)
    await say(tiny_worker, "after", **common)
    assert "dropped" not in answers.deltas


async def test_a_real_model_is_guided_through_merged_tokens(smollm2: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(smollm2), device="cpu"))
    worker.steps = answers = Answers()
    await worker.load()
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 30}, "country": {"enum": ["France", "Peru"]}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    question = [{"role": "user", "content": "What is the capital of France? Answer with its name and country."}]
    for name, guide in (
        ("json", {"guided_json": json.dumps(schema)}),
        ("choice", {"guided_choice": ("Lima", "Paris")}),
    ):
        sampling = SamplingParams(temperature=0, max_new_tokens=40, **guide)
        worker.begin(GenerateRequest(messages=question, request_id=name, sampling=sampling))
    await answers.until("json", "choice")
    await worker.close()
    assert json.loads(answers.text("json"))["country"] == "France"
    assert answers.text("choice") == "Paris"
