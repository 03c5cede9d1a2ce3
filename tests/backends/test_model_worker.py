"""ModelWorker without a fabric: a tiny random model, and the real SmolLM2 and MiniLM."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.tiny import Answers, ask, reference
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, ContextOverflowError, RequestError
from zfabric.wire.payloads import CountRequest, GenerateRequest
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tasks import DetokenizeRequest, EmbedRequest

Served = tuple[ModelWorker, Answers]
PROMPTS = ["Hello", "The quick brown fox jumps", "a", "Once upon a time there was", "é世界", "0123456789 " * 5]


async def run(served: Served, *requests: GenerateRequest) -> Answers:
    worker, answers = served
    for request in requests:
        worker.begin(request)
    await answers.until(*(request.request_id for request in requests))
    return answers


async def test_a_batch_says_what_generate_says_one_by_one(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    names = [f"r{index}" for index in range(len(PROMPTS))]
    for index, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True)):
        worker.begin(ask(name, prompt, temperature=0, max_new_tokens=20 + 7 * index, ignore_eos=True))
        await answers.until(name, tokens=3)
    await answers.until(*names)
    assert answers.largest_step > 1
    for index, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True)):
        assert answers.tokens(name) == reference(tiny_llama, prompt, 20 + 7 * index)
        assert answers.last(name).finish_reason == "length"


async def test_plain_tokens_leave_as_columns_and_whatever_has_more_does_not(
    tiny_worker: Served, tiny_llama: Path
) -> None:
    answers = await run(
        tiny_worker,
        ask("plain", temperature=0, max_new_tokens=12, ignore_eos=True),
        ask("scored", temperature=0, max_new_tokens=12, ignore_eos=True, logprobs=1),
        ask("two", temperature=1, seed=3, max_new_tokens=12, ignore_eos=True, n=2),
        ask("prompted", temperature=0, max_new_tokens=12, ignore_eos=True, prompt_logprobs=1),
        ask("best", temperature=1, seed=3, max_new_tokens=12, ignore_eos=True, best_of=2),
    )
    assert answers.plain == {"plain": 11}
    assert (
        answers.tokens("plain")
        == answers.tokens("scored")
        == answers.tokens("prompted")
        == reference(tiny_llama, "Hello there", 12)
    )
    assert answers.text("plain") == answers.text("scored")


async def test_chunked_prefill_gives_the_same_text(tiny_llama: Path) -> None:
    texts = []
    for chunk in (7, 512):
        worker = ModelWorker(
            TransformersOptions(model=str(tiny_llama), dtype="float32", device="cpu", prefill_chunk_tokens=chunk)
        )
        worker.steps = answers = Answers()
        await worker.load()
        await run((worker, answers), ask("a", "x" * 200, temperature=0, max_new_tokens=10))
        texts.append(answers.tokens("a"))
        await worker.close()
    assert texts[0] == texts[1]


async def test_a_seed_gives_the_same_text_in_any_company(tiny_worker: Served) -> None:
    answers = await run(tiny_worker, ask("alone", seed=7, max_new_tokens=24, ignore_eos=True))
    company = [ask(f"c{n}", PROMPTS[n], seed=n, max_new_tokens=10 + n, ignore_eos=True) for n in range(5)]
    await run(tiny_worker, *company, ask("together", seed=7, max_new_tokens=24, ignore_eos=True))
    assert answers.tokens("alone") == answers.tokens("together")
    await run(tiny_worker, ask("other", seed=8, max_new_tokens=24, ignore_eos=True))
    assert answers.tokens("other") != answers.tokens("alone")


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "echo": True}])
async def test_a_continuation_says_the_rest(tiny_worker: Served, sampling: dict[str, Any]) -> None:
    whole = await run(tiny_worker, ask("whole", max_new_tokens=12, ignore_eos=True, **sampling))
    tokens = whole.tokens("whole")
    shown, characters = 0, 0
    for delta in whole.deltas["whole"]:
        shown += len(delta.token_ids)
        characters += len(delta.text)
        name = f"from{shown}-{characters}"
        request = ask(
            name,
            max_new_tokens=12,
            ignore_eos=True,
            resume_token_ids=tokens[:shown],
            resume_characters=characters,
            **sampling,
        )
        await run(tiny_worker, request)
        assert whole.tokens(name) == tokens[shown:]
        assert whole.text(name) == whole.text("whole")[characters:]
        usage = whole.last(name).usage
        assert usage is not None
        assert usage.completion_tokens == 12


async def test_stop_strings_straddle_tokens(tiny_worker: Served) -> None:
    answers = await run(tiny_worker, ask("free", temperature=0, max_new_tokens=40, ignore_eos=True))
    text = answers.text("free")
    stop = next(text[at : at + 3] for at in range(5, len(text)) if len(text[at : at + 3]) == 3)
    await run(tiny_worker, ask("stopped", temperature=0, max_new_tokens=40, ignore_eos=True, stop=(stop,)))
    assert answers.text("stopped") == text[: text.index(stop)]
    assert (answers.last("stopped").finish_reason, answers.last("stopped").stop_reason) == ("stop", stop)


async def test_stop_tokens_and_least_length(tiny_worker: Served) -> None:
    answers = await run(tiny_worker, ask("free", temperature=0, max_new_tokens=10, ignore_eos=True))
    token = answers.tokens("free")[2]
    first = answers.tokens("free").index(token)
    await run(tiny_worker, ask("stopped", temperature=0, max_new_tokens=10, ignore_eos=True, stop_token_ids=(token,)))
    assert answers.tokens("stopped") == answers.tokens("free")[: first + 1]
    assert (answers.last("stopped").finish_reason, answers.last("stopped").stop_reason) == ("stop", token)
    longer = ask("longer", temperature=0, max_new_tokens=10, ignore_eos=True, stop_token_ids=(token,), min_new_tokens=8)
    await run(tiny_worker, longer)
    assert len(answers.tokens("longer")) >= 8


async def test_logprobs_are_those_of_the_model(tiny_worker: Served, tiny_llama: Path) -> None:
    answers = await run(
        tiny_worker,
        ask(
            "a", temperature=0, max_new_tokens=5, logprobs=3, prompt_logprobs=1, ignore_eos=True, frequency_penalty=1.0
        ),
    )
    entries = [entry for delta in answers.deltas["a"] for entry in delta.logprobs or ()]
    prompt = [entry for delta in answers.deltas["a"] for entry in delta.prompt_logprobs or ()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = tokenizer("Hello there")["input_ids"]
    tokens = answers.tokens("a")
    with torch.inference_mode():
        logp = model(torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
    assert len(entries) == 5
    for position, entry in enumerate(entries):
        at = logp[len(ids) - 1 + position]
        assert entry.token.logprob == pytest.approx(at[tokens[position]].item(), abs=1e-4)
        assert [other.token_id for other in entry.top] == at.topk(3).indices.tolist()
    assert len(prompt) == len(ids)
    assert prompt[0] is None
    for position, known in enumerate(prompt[1:], start=1):
        assert known is not None
        assert known.token.logprob == pytest.approx(logp[position - 1][ids[position]].item(), abs=1e-4)


async def test_choices_share_a_prompt_and_differ(tiny_worker: Served) -> None:
    answers = await run(tiny_worker, ask("n", n=3, seed=1, max_new_tokens=12, ignore_eos=True))
    texts = [answers.tokens("n", index) for index in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    assert all(len(text) == 12 for text in texts)
    usage = answers.last("n").usage
    assert usage is not None
    assert usage.completion_tokens == 36
    assert sum(delta.finish_reason is not None for delta in answers.deltas["n"]) == 3


async def test_echo_begins_with_the_prompt(tiny_worker: Served) -> None:
    answers = await run(tiny_worker, ask("e", "Say it", echo=True, temperature=0, max_new_tokens=4, ignore_eos=True))
    plain = await run(tiny_worker, ask("p", "Say it", temperature=0, max_new_tokens=4, ignore_eos=True))
    assert answers.text("e") == "Say it" + plain.text("p")


async def test_an_aborted_request_frees_its_place(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    worker.begin(ask("long", max_new_tokens=400, temperature=0, ignore_eos=True))
    await answers.until("long", tokens=3)
    worker.abort("long")
    await run(tiny_worker, ask("next", temperature=0, max_new_tokens=5))
    seen = len(answers.tokens("long"))
    await run(tiny_worker, ask("another", temperature=0, max_new_tokens=20, ignore_eos=True))
    assert len(answers.tokens("long")) == seen
    assert seen < 400
    assert worker.load_report().gauges["kv_tokens_free"] == worker._assembled.loaded.kv_tokens_max  # type: ignore[union-attr]


async def test_prompts_that_cannot_be_served_say_why(tiny_worker: Served) -> None:
    answers = await run(
        tiny_worker,
        ask("long", "x" * 600),
        GenerateRequest(prompt_token_ids=[1, 100_000], request_id="unknown"),
        ask("cut", "x" * 600, truncate_prompt=True, max_new_tokens=1, ignore_eos=True),
    )
    error = answers.errors["long"]
    assert isinstance(error, ContextOverflowError)
    assert error.details["context_length"] == 512
    assert isinstance(answers.errors["unknown"], RequestError)
    assert answers.last("cut").usage is not None


async def test_messages_go_through_the_template(tiny_worker: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    sampling = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    chat = GenerateRequest(messages=messages, request_id="chat", sampling=sampling)
    answers = await run(
        tiny_worker, chat, ask("plain", "<user>hi\n<assistant>", temperature=0, max_new_tokens=6, ignore_eos=True)
    )
    assert answers.tokens("chat") == answers.tokens("plain")
    worker, _ = tiny_worker
    assert await worker.count_tokens(CountRequest(messages=messages)) == len("<user>hi\n<assistant>")


async def test_the_event_loop_turns_while_the_model_computes(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    for index in range(8):
        worker.begin(ask(f"r{index}", temperature=0, max_new_tokens=60, ignore_eos=True))
    turns = 0
    while not all(answers.ended(f"r{index}") for index in range(8)):
        await asyncio.sleep(0)
        turns += 1
    assert turns > 100


async def test_smollm2_answers(smollm2: Path) -> None:
    # In bfloat16 its first word and the French for "the" are alike: 25.36 and 25.26 of float32 are both 25.375.
    options = TransformersOptions(model=str(smollm2), dtype="float32", device="cpu", model_names=("smollm2",))
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    assert info.name == "smollm2"
    assert "chat" in info.capabilities
    request = GenerateRequest(
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        request_id="france",
        sampling=SamplingParams(temperature=0, max_new_tokens=20),
    )
    await run((worker, answers), request)
    await worker.close()
    assert answers.text("france") == "The capital of France is Paris."
    assert answers.last("france").finish_reason == "stop"


async def test_minilm_embeds(minilm: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(minilm), device="cpu"))
    worker.steps = Answers()
    (info,) = await worker.load()
    assert info.capabilities == ["embed", "embed_tokens", "score", "count_tokens", "tokenize", "detokenize"]
    texts = ["a cat", "a kitten", "quarterly revenue", "the quick brown fox jumps over the lazy dog"]

    async def vectors(*inputs: str, **options: Any) -> np.ndarray[Any, Any]:
        result = await worker.embed(EmbedRequest(inputs=list(inputs), **options))
        return np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)

    together = await vectors(*texts)
    assert together.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert together[0] @ together[1] > 0.5 > together[0] @ together[2]
    for index, text in enumerate(texts):
        np.testing.assert_allclose((await vectors(text))[0], together[index], atol=1e-5)
    short = await vectors("a cat", dimensions=64)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    long = "word " * 1_000
    with pytest.raises(ContextOverflowError):
        await vectors(long)
    assert (await vectors(long, truncate="cut")).shape == (1, 384)
    assert (await vectors(long, truncate="chunk")).shape == (1, 384)
    await worker.close()


async def test_options_that_cannot_work_say_why(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        await ModelWorker(TransformersOptions(model=str(tmp_path))).load()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="finds no CUDA"):
            await ModelWorker(TransformersOptions(model=str(tiny_llama), device="cuda")).load()


async def test_tokens_of_a_text_and_back(tiny_worker: Served) -> None:
    worker, _ = tiny_worker
    tokens = await worker.tokenize(CountRequest(prompt="Hello é"))
    assert len(tokens) == await worker.count_tokens(CountRequest(prompt="Hello é"))
    assert await worker.detokenize(DetokenizeRequest(token_ids=tokens)) == "Hello é"
    assert await worker.detokenize(DetokenizeRequest(token_ids=[*tokens, 1])) == "Hello é</s>"
    assert await worker.detokenize(DetokenizeRequest(token_ids=[*tokens, 1], skip_special_tokens=True)) == "Hello é"
    with pytest.raises(RequestError, match="outside of the vocabulary"):
        await worker.detokenize(DetokenizeRequest(token_ids=[10**6]))
