"""What one client sends costs that client: bounds are kept before any work, and the model tells whose fault a failure is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.backends.pictures import chat, png
from tests.backends.tiny import Answers, ask, byte_tokenizer, reference, save_llama
from zfabric import limits
from zfabric.backends.front import bounds, images
from zfabric.backends.front.bounds import check_logprobs, check_prompt_logprobs
from zfabric.backends.front.embed_inputs import EmbedInputs, with_special_tokens
from zfabric.backends.front.prompts import PromptTokens
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ContextOverflowError, ParameterRangeError, RequestError, TooLargeError
from zfabric.wire.payloads import CountRequest, GenerateRequest, TokenLogprobs
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tasks import EmbedRequest

Served = tuple[ModelWorker, Answers]
STRANGE = "<strange>"


@pytest_asyncio.fixture
async def extended(tmp_path: Path) -> AsyncIterator[Served]:
    """A model whose tokenizer has got a token that the model has no vector for."""
    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path))
    tokenizer.add_tokens([STRANGE])
    tokenizer.save_pretrained(tmp_path)
    worker = ModelWorker(TransformersOptions(model=str(tmp_path), dtype="float32", device="cpu"))
    worker.steps = answers = Answers()
    await worker.load()
    yield worker, answers
    await worker.close()


async def test_tokens_without_a_vector_harm_nobody_wherever_they_come_from(extended: Served, tmp_path: Path) -> None:
    worker, answers = extended
    worker.begin(ask("neighbour", "Hello", temperature=0, max_new_tokens=60, ignore_eos=True))
    bad = []
    for number in range(20):
        bad += [f"text {number}", f"chat {number}", f"resumed {number}"]
        worker.begin(ask(f"text {number}", f"a {STRANGE}"))
        request = ask(f"chat {number}")
        request.prompt, request.messages = None, [{"role": "user", "content": STRANGE}]
        worker.begin(request)
        worker.begin(ask(f"resumed {number}", resume_token_ids=[5, 10_000]))
    await answers.until("neighbour", *bad)
    for name in bad:
        assert isinstance(answers.errors[name], RequestError), name
        assert "outside of the vocabulary of 259" in str(answers.errors[name])
    with pytest.raises(RequestError, match="vocabulary"):
        await worker.embed(EmbedRequest(inputs=[f"a {STRANGE}"]))
    assert answers.tokens("neighbour") == reference(tmp_path, "Hello", 60)
    assert not answers.logged


async def test_a_token_that_cannot_be_read_is_not_drawn(tmp_path: Path) -> None:
    """Some models have more rows at their end than at their beginning."""
    save_llama(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    wide = torch.nn.Linear(64, 300, bias=False)
    with torch.no_grad():
        wide.weight.fill_(0)
        wide.weight[:259] = model.lm_head.weight
        wide.weight[259:] = model.lm_head.weight[:41] * 3
    worker = ModelWorker(TransformersOptions(model=str(tmp_path), dtype="float32", device="cpu", pack_weights=False))
    worker.steps = answers = Answers()
    await worker.load()
    assert worker._assembled is not None
    worker._assembled.loaded.model.lm_head = wide
    worker.begin(ask("a", "Hello", temperature=0, max_new_tokens=60, ignore_eos=True, logprobs=20))
    await answers.until("a")
    await worker.close()
    assert answers.tokens("a") == reference(tmp_path, "Hello", 60)


async def test_prompts_that_break_cost_their_requests_alone_however_many(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    assert worker._assembled is not None
    poison = torch.tensor([0x10 + 3])

    def fail(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] > 1 and torch.isin(given["input_ids"], poison).any():
            raise ValueError("poisoned")

    worker._assembled.loaded.model.register_forward_pre_hook(fail, with_kwargs=True)
    letter = byte_tokenizer().decode(poison)
    worker.begin(ask("neighbour", "Hello", temperature=0, max_new_tokens=80, ignore_eos=True))
    names = [f"bad {number}" for number in range(30)]
    for name in names:
        worker.begin(ask(name, f"Once {letter}"))
    worker.begin(ask("good", "Hello", temperature=0, max_new_tokens=5, ignore_eos=True))
    await answers.until("neighbour", "good", *names)
    assert all("poisoned" in str(answers.errors[name]) for name in names)
    assert answers.tokens("neighbour") == reference(tiny_llama, "Hello", 80)
    assert not answers.logged


class _Counting:
    """A tokenizer that notes how much it is given."""

    def __init__(self) -> None:
        self._inner = byte_tokenizer()
        self.longest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self._inner(text, **options)


def test_a_text_that_cannot_fit_is_not_even_read() -> None:
    tokenizer = _Counting()
    prompts = PromptTokens(tokenizer, vocabulary_size=259, context_length=100)
    huge = "x" * 5_000_000
    for given in ((huge, None, None), (None, [{"role": "user", "content": huge}], None), (None, None, [5] * 200)):
        with pytest.raises(ContextOverflowError) as caught:
            prompts.make(*given)
        assert int(str(caught.value.details["prompt_tokens"])) > 100
    assert tokenizer.longest == 0
    assert prompts.make(huge + "abc", None, None, truncate=True)[-3:] == byte_tokenizer()("abc")["input_ids"]
    assert prompts.make(None, None, [5] * 200 + [7], truncate=True)[-1] == 7
    assert tokenizer.longest <= 16 * 100
    assert len(prompts.make("x" * 3_000, None, None, bounded=False)) == 3_000


class _NeverRead:
    """A tokenizer that nothing may be given to."""

    chat_template = "{{ messages }}"

    def get_vocab(self) -> dict[str, int]:
        return {"abc": 0}

    def __call__(self, *_: Any, **__: Any) -> Any:
        pytest.fail("it was read")

    apply_chat_template = get_chat_template = __call__


def test_inputs_of_vectors_and_messages_that_cannot_fit_are_not_read() -> None:
    size, length, huge = 16, 100, "x" * 1_601
    inputs = EmbedInputs(with_special_tokens(_NeverRead()), context_length=length, vocabulary_size=9, longest=size)
    with pytest.raises(ContextOverflowError, match="input 0 has 101 tokens, context is 100"):
        inputs.pieces(EmbedRequest(inputs=[huge]))
    part = {"type": "text", "text": huge}
    for content in (huge, [part], [{"type": "text", "text": "x"}, part]):
        with pytest.raises(ContextOverflowError, match="101 tokens"):
            bounds.check_messages([{"role": "user", "content": content}], size, length)
    # What the assistant has said may be left out by a template.
    bounds.check_messages(
        [{"role": "assistant", "content": huge}, {"role": "user", "content": "x" * 1_600}], size, length
    )
    with pytest.raises(ContextOverflowError):
        bounds.check_pair("x" * 800, "y" * 801, size, length)


def test_a_text_that_is_to_be_cut_is_read_as_far_as_it_can_count() -> None:
    tokenizer = _Counting()
    made = []
    for longest in (16, None):
        inputs = EmbedInputs(
            with_special_tokens(tokenizer), context_length=100, vocabulary_size=259, longest=longest
        )  # fmt: skip
        made.append(inputs.pieces(EmbedRequest(inputs=["abc" * 10_000], truncate="cut")))
        assert tokenizer.longest == (3_200 if longest else 30_000)
    assert made[0] == made[1]


async def test_a_long_text_is_counted_though_it_does_not_fit(tiny_worker: Served) -> None:
    assert await tiny_worker[0].count_tokens(CountRequest(prompt="x" * 20_000)) == 20_000


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
async def test_log_probabilities_are_bounded_and_the_bound_can_be_set(
    tiny_worker: Served, tiny_llama: Path, name: str
) -> None:
    worker, answers = tiny_worker

    def wanting(request_id: str, count: int) -> GenerateRequest:
        sampling: dict[str, Any] = {name: count}
        return ask(request_id, max_new_tokens=2, **sampling)

    worker.begin(wanting("fits", limits.LOGPROBS_MAX))
    worker.begin(wanting("more", limits.LOGPROBS_MAX + 1))
    await answers.until("fits", "more")
    assert isinstance(answers.errors["more"], ParameterRangeError)
    assert answers.errors["more"].details["parameter"] == name
    assert answers.tokens("fits")
    options = TransformersOptions(model=str(tiny_llama), dtype="float32", device="cpu", max_logprobs=200)
    wider = ModelWorker(options)
    wider.steps = told = Answers()
    await wider.load()
    wider.begin(wanting("many", 200))
    await told.until("many")
    await wider.close()
    delta = told.deltas["many"][0]
    entries: list[TokenLogprobs | None] = [*(delta.logprobs or ()), *(delta.prompt_logprobs or ())]
    entry = entries[-1]
    assert entry is not None
    assert len(entry.top) == 200


def test_what_goes_out_in_one_piece_fits_a_frame() -> None:
    check_logprobs(SamplingParams(logprobs=0), 0)
    check_prompt_logprobs(20, limits.PROMPT_LOGPROBS_MAX // 21)
    with pytest.raises(ParameterRangeError, match="must be at most 0"):
        check_logprobs(SamplingParams(logprobs=1), 0)
    with pytest.raises(ParameterRangeError, match="for a prompt of 100000 tokens"):
        check_prompt_logprobs(20, 100_000)
    # An entry is a token, a number, a text and a rank.
    assert limits.PROMPT_LOGPROBS_MAX * 64 <= limits.FRAME_BYTES_MAX


def test_images_are_bounded_together_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL.Image import Image

    monkeypatch.setattr(Image, "convert", lambda *_: pytest.fail("decoded"))
    sent = chat(*[{"type": "image", "image": png("red", (4_000, 4_000))}] * 5)
    with pytest.raises(TooLargeError, match="80000000 pixels"):
        images.see(object(), byte_tokenizer(), sent, None)
    many = chat(*[{"type": "image", "image": png("red")}] * (limits.IMAGES_MAX + 1))
    with pytest.raises(TooLargeError, match=f"{limits.IMAGES_MAX + 1} images"):
        images.see(object(), byte_tokenizer(), many, None)


async def test_a_long_prompt_at_the_head_of_the_line_keeps_nobody_out_who_fits(tiny_llama: Path) -> None:
    options = TransformersOptions(model=str(tiny_llama), dtype="float32", device="cpu", kv_tokens_max=300)
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    await worker.load()
    worker.begin(ask("runs", "x" * 40, temperature=0, max_new_tokens=60, ignore_eos=True))
    await answers.until("runs", tokens=2)
    worker.begin(ask("long", "y" * 240, temperature=0, max_new_tokens=8, ignore_eos=True))
    worker.begin(ask("short", "z" * 8, temperature=0, max_new_tokens=8, ignore_eos=True))
    await answers.until("short")
    assert not answers.ended("runs")
    assert not answers.tokens("long")
    await answers.until("runs", "long")
    await worker.close()
    assert answers.tokens("long") == reference(tiny_llama, "y" * 240, 8)
    assert answers.tokens("short") == reference(tiny_llama, "z" * 8, 8)


async def test_whoever_is_overtaken_comes_to_his_turn(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.backends.hf_transformers.scheduling.engine_core._OVERTAKEN_MAX", 4)
    options = TransformersOptions(model=str(tiny_llama), dtype="float32", device="cpu", kv_tokens_max=300)
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    await worker.load()
    worker.begin(ask("first", "x" * 40, temperature=0, max_new_tokens=12, ignore_eos=True))
    await answers.until("first", tokens=1)
    worker.begin(ask("long", "y" * 200, temperature=0, max_new_tokens=4, ignore_eos=True))
    going = True

    async def crowd(lane: int) -> None:
        number = 0
        while going:
            name = f"{lane}/{number}"
            worker.begin(ask(name, "z" * 30, temperature=0, max_new_tokens=20, ignore_eos=True))
            await answers.until(name)
            number += 1

    lanes = [asyncio.create_task(crowd(lane)) for lane in range(3)]
    await answers.until("long")
    going = False
    await asyncio.gather(*lanes)
    await worker.close()
    assert len(answers.tokens("long")) == 4


async def test_a_search_that_finds_too_few_answers_ends_with_an_error(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    # Two tokens are left, and after the first place one of them alone: two texts of one token each.
    allowed = {40, 41}
    bias = {token: float("-inf") for token in range(259) if token not in allowed}
    worker.begin(ask("few", use_beam_search=True, n=4, max_new_tokens=1, ignore_eos=True, logit_bias=bias))
    await answers.until("few")
    assert isinstance(answers.errors["few"], RequestError)
    assert "found 2 answers, 4 are wanted" in str(answers.errors["few"])
