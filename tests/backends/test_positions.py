"""Models whose positions have a time, a height and a width: a tiny Qwen2-VL in a running batch, and a tiny Qwen3.5, whose layers
keep states besides."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.backends.pictures import ask, chat, png, text
from tests.backends.tiny import Answers, byte_tokenizer
from zfabric.backends.hf_transformers.loading import model_loader
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker

MARKS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}:"
)


class Processor:
    """What the real one does with images alone; the real one needs torchvision, for videos."""

    chat_template = TEMPLATE

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4_096)

    @classmethod
    def from_pretrained(cls, directory: str, **_: Any) -> Processor:
        return cls(qwen_tokenizer())

    def __call__(self, text: list[str], images: list[Any], **_: Any) -> dict[str, Any]:
        made = dict(self.images(images, return_tensors="pt"))
        (words,) = text
        for grid in made["image_grid_thw"]:
            words = words.replace(MARKS[1], "\0" * int(grid.prod() // 4), 1)
        ids = torch.tensor([self.tokenizer(words.replace("\0", MARKS[1]))["input_ids"]])
        seen = (ids == self.tokenizer.convert_tokens_to_ids(MARKS[1])).int()
        return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": seen}


def qwen_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen2-VL."""
    directory = tmp_path_factory.mktemp("tiny-qwen")
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    start, image, end, video = tokenizer.convert_tokens_to_ids(MARKS)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "initializer_range": 0.5,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen3.5, with a layer of linear attention before one of attention."""
    directory = tmp_path_factory.mktemp("tiny-qwen3-5")
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    start, image, end, video = tokenizer.convert_tokens_to_ids(MARKS)
    config = Qwen3_5Config(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
            "pad_token_id": 2, "initializer_range": 0.5, "rope_parameters": {
                "rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4,
            "num_position_embeddings": 64, "initializer_range": 0.5,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    model = Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def expected(directory: Path, words: str, images: list[bytes], count: int) -> list[int]:
    """What transformers' own generate makes of it alone."""
    processor = Processor(qwen_tokenizer())
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    if images:
        inputs = processor([words], [Image.open(io.BytesIO(data)).convert("RGB") for data in images])
    else:
        inputs = {"input_ids": torch.tensor([processor.tokenizer(words)["input_ids"]])}
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize(
    ("model", "options"), [("tiny_qwen", {}), ("tiny_qwen", {"kv_tokens_max": 160}), ("tiny_qwen3_5", {})]
)
async def test_images_keep_their_places_in_a_batch(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    tiny_qwen: Path = request.getfixturevalue(model)
    monkeypatch.setitem(model_loader._PROCESSORS, "vision", Processor)
    worker = ModelWorker(TransformersOptions(model=str(tiny_qwen), dtype="float32", device="cpu", **options))
    worker.steps = answers = Answers()
    await worker.load()
    wide, high = png("red", (48, 16)), png("blue", (16, 32))
    worker.begin(ask("text", [{"role": "user", "content": [text("What?")]}], 30))
    await answers.until("text", tokens=2)
    worker.begin(ask("wide", chat({"type": "image", "image": wide}, text("What?"))[1:], 24))
    worker.begin(ask("high", chat(text("Now"), {"type": "image", "image": high}, text("?"))[1:], n=2))
    await answers.until("text", "wide", "high")
    searched = ask("search", chat({"type": "image", "image": wide}, text("What?"))[1:], 8, use_beam_search=True, n=2)
    worker.begin(searched)
    await answers.until("search")
    await worker.close()
    assert not answers.errors
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert answers.tokens("text") == expected(tiny_qwen, "What?:", [], 30)
    assert answers.tokens("wide") == expected(tiny_qwen, f"{image}What?:", [wide], 24)
    assert answers.tokens("high", 0) == answers.tokens("high", 1) == expected(tiny_qwen, f"Now{image}?:", [high], 16)
    assert len(answers.tokens("search", 0)) == 8
