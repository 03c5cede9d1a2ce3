"""Encoder-decoders whose decoders count places, and tokens that `generate` forces: in a running batch, as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)

from tests.backends.test_engine import hold, prepared
from tests.backends.tiny import Answers, ask, byte_tokenizer
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, ContextOverflowError, ParameterRangeError

PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog", "a", "Once upon a time"]
#: A code of a language, as translators begin their answers with.
LANGUAGE = 200
_SIZES: dict[str, Any] = {
    "vocab_size": 259, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 1.0,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

_FSMT_SIZES: dict[str, Any] = {
    **{name: value for name, value in _SIZES.items() if name != "vocab_size"}, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "num_beams": 1, "init_std": 0.1,
}  # fmt: skip


def save(directory: Path, model: Any, **generation: Any) -> Path:
    """A model with a tokenizer of bytes, and what it says of its answers."""
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    # Else it is made anew of the model's configuration.
    model.generation_config._from_model_config = False
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Bart's makers have it: the first token and the last are forced, and another one never begins an answer."""
    torch.manual_seed(0)
    config = BartConfig(max_position_embeddings=64, tie_word_embeddings=False, **_SIZES)
    said = {"forced_bos_token_id": 0, "forced_eos_token_id": 1, "begin_suppress_tokens": [60]}
    return save(tmp_path_factory.mktemp("tiny-bart"), BartForConditionalGeneration(config), **said)


@pytest.fixture(scope="session")
def tiny_m2m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Places as waves, but none for the token that pads."""
    torch.manual_seed(0)
    config = M2M100Config(max_position_embeddings=64, tie_word_embeddings=False, **_SIZES)
    return save(tmp_path_factory.mktemp("tiny-m2m"), M2M100ForConditionalGeneration(config))


@pytest.fixture(scope="session")
def tiny_led(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its encoder looks at windows, and its decoder makes no mask for a step."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "init_std": 0.1}
    model = LEDForConditionalGeneration(LEDConfig(attention_window=8, tie_word_embeddings=False, **sizes))
    return save(tmp_path_factory.mktemp("tiny-led"), model)


@pytest.fixture(scope="session")
def tiny_fsmt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its decoder makes no mask once it has a cache."""
    torch.manual_seed(0)
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=259, tgt_vocab_size=259, **_FSMT_SIZES)
    return save(tmp_path_factory.mktemp("tiny-fsmt"), FSMTForConditionalGeneration(config))


async def serve(directory: Path, **options: Any) -> tuple[ModelWorker, Answers]:
    worker = ModelWorker(TransformersOptions(model=str(directory), dtype="float32", device="cpu", **options))
    worker.steps = answers = Answers()
    await worker.load()
    return worker, answers


def expected(directory: Path, prompt: str, count: int, **options: Any) -> list[list[int]]:
    """What transformers' own generate makes of a prompt alone."""
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    ids = byte_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, **options}
    lines: list[list[int]] = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, **options)[
        :, 1:
    ].tolist()
    return lines


def greedy(name: str, prompt: str, count: int, **more: Any) -> Any:
    return ask(name, prompt, temperature=0, max_new_tokens=count, ignore_eos=True, **more)


@pytest.mark.parametrize("fixture", ["tiny_bart", "tiny_m2m", "tiny_led", "tiny_fsmt"])
async def test_rows_of_a_batch_have_places_of_their_own(fixture: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(fixture)
    worker, answers = await serve(directory)
    # One after the other, so that rows differ in length; then all at once, in the same passes.
    for index, prompt in enumerate(PROMPTS):
        worker.begin(greedy(prompt, prompt, 16 + 5 * index))
        await answers.until(prompt, tokens=3)
    await answers.until(*PROMPTS)
    assert answers.largest_step > 1
    gate = hold(worker)
    for prompt in PROMPTS:
        worker.begin(greedy(f"{prompt} again", prompt, 8, n=2))
    await prepared(worker)
    gate.set()
    await answers.until(*[f"{prompt} again" for prompt in PROMPTS])
    await worker.close()
    assert not answers.errors
    for index, prompt in enumerate(PROMPTS):
        (wanted,) = expected(directory, prompt, 16 + 5 * index)
        assert answers.tokens(prompt) == wanted
        (short,) = expected(directory, prompt, 8)
        assert answers.tokens(f"{prompt} again", 0) == answers.tokens(f"{prompt} again", 1) == short
        assert len(set(wanted)) > 2


@pytest.mark.parametrize("fixture", ["tiny_m2m", "tiny_led", "tiny_fsmt"])
async def test_rows_that_are_computed_anew_are_the_same(fixture: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(fixture)
    # The cache does not hold them all, so that some give their places back and begin again, with what they have.
    worker, answers = await serve(directory, kv_tokens_max=120, context_length=60)
    for prompt in PROMPTS:
        worker.begin(greedy(prompt, prompt, 30))
    await answers.until(*PROMPTS)
    worker.begin(ask("whole", PROMPTS[1], seed=3, max_new_tokens=12, ignore_eos=True))
    await answers.until("whole")
    tokens = answers.tokens("whole")
    worker.begin(ask("rest", PROMPTS[1], seed=3, max_new_tokens=12, ignore_eos=True, resume_token_ids=tokens[:5]))
    await answers.until("rest")
    await worker.close()
    assert [[answers.tokens(prompt)] for prompt in PROMPTS] == [expected(directory, prompt, 30) for prompt in PROMPTS]
    assert answers.tokens("rest") == tokens[5:]


async def test_tokens_are_forced_as_generate_does(tiny_bart: Path) -> None:
    worker, answers = await serve(tiny_bart)
    worker.begin(greedy("plain", "Hello", 9))
    language = greedy("language", "Hello", 9)
    language.extra = {"forced_bos_token_id": LANGUAGE}
    unknown = greedy("unknown", "Hello", 9)
    unknown.extra = {"forced_bos_token_id": 900}
    worker.begin(language)
    worker.begin(unknown)
    worker.begin(greedy("one", "Hello", 1))
    worker.begin(ask("beams", PROMPTS[1], use_beam_search=True, n=2, best_of=3, max_new_tokens=9, ignore_eos=True))
    await answers.until("plain", "language", "unknown", "one", "beams")
    await worker.close()
    assert [answers.tokens("plain")] == expected(tiny_bart, "Hello", 9)
    assert [answers.tokens("language")] == expected(tiny_bart, "Hello", 9, forced_bos_token_id=LANGUAGE)
    assert [answers.tokens("one")] == expected(tiny_bart, "Hello", 1) == [[1]]
    assert isinstance(answers.errors["unknown"], ParameterRangeError)
    # What begins and ends it was none of the model's; an end that is forced is one by length.
    assert (answers.tokens("plain")[0], answers.tokens("plain")[-1]) == (0, 1)
    assert answers.last("plain").finish_reason == "length"
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    assert [answers.tokens("beams", index) for index in range(2)] == expected(tiny_bart, PROMPTS[1], 9, **options)


async def test_places_are_bounds(tiny_bart: Path) -> None:
    worker, answers = await serve(tiny_bart)
    (info,) = worker._models()
    assert info.context_length == 64
    worker.begin(ask("long", "x" * 65))
    worker.begin(ask("fits", "x" * 64, temperature=0, ignore_eos=True))
    await answers.until("long", "fits")
    await worker.close()
    assert isinstance(answers.errors["long"], ContextOverflowError)
    assert "65" in str(answers.errors["long"])
    # The first place is that of the token that the decoder begins with.
    assert len(answers.tokens("fits")) == 63
    assert answers.last("fits").finish_reason == "length"


async def test_what_cannot_be_batched_or_makes_no_text_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_experts": 4, "moe_eval_capacity_token_fraction": 0.5, "max_position_embeddings": 64}
    bounded = tmp_path / "bounded"
    NllbMoeForConditionalGeneration(NllbMoeConfig(**sizes)).save_pretrained(bounded)
    byte_tokenizer().save_pretrained(bounded)
    with pytest.raises(ConfigurationError, match="take a share of a batch's tokens"):
        await serve(bounded)
    bare = tmp_path / "bare"
    BartModel(BartConfig(max_position_embeddings=64, **_SIZES)).save_pretrained(bare)
    byte_tokenizer().save_pretrained(bare)
    with pytest.raises(ConfigurationError, match="no head"):
        await serve(bare)


async def test_a_language_may_be_read_by_other_tokens_than_one_is_written_by(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=259, tgt_vocab_size=200, **_FSMT_SIZES)
    directory = save(tmp_path / "fsmt", FSMTForConditionalGeneration(config))
    worker, answers = await serve(directory)
    tokens = [*byte_tokenizer()("Hello")["input_ids"], 255, 258]
    worker.begin(structs.replace(greedy("read", "", 8), prompt=None, prompt_token_ids=tokens))
    worker.begin(structs.replace(greedy("unknown", "", 8), prompt=None, prompt_token_ids=[259]))
    await answers.until("read", "unknown")
    await worker.close()
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    wanted = model.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False, eos_token_id=None, num_beams=1)
    assert answers.tokens("read") == wanted[0, 1:].tolist()
    assert "259" in str(answers.errors["unknown"])
