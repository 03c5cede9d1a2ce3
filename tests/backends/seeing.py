"""Tiny random models that see, and what makes their input: the real processors need torchvision, or files of their makers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.backends.tiny import byte_tokenizer

MARKS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}:"
)
#: A picture in a prompt.
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.5,
}  # fmt: skip


class Processor:
    """What that of Qwen's models does with images alone; the real one needs torchvision, for videos."""

    chat_template = TEMPLATE

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4_096)

    @classmethod
    def from_pretrained(cls, directory: str, **_: Any) -> Processor:
        return cls(seeing_tokenizer())

    def __call__(self, text: list[str], images: list[Any], **_: Any) -> dict[str, Any]:
        made, counts = self.seen(images)
        (words,) = text
        for count in counts:
            words = words.replace(MARKS[1], "\0" * count, 1)
        ids = torch.tensor([self.tokenizer(words.replace("\0", MARKS[1]))["input_ids"]])
        seen = (ids == self.tokenizer.convert_tokens_to_ids(MARKS[1])).int()
        return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids), **self.told(seen)}

    def seen(self, images: list[Any]) -> tuple[dict[str, Any], list[int]]:
        """Images as arguments of the model, and how many tokens each has."""
        made = dict(self.images(images, return_tensors="pt"))
        return made, [int(grid.prod() // 4) for grid in made["image_grid_thw"]]

    def told(self, seen: torch.Tensor) -> dict[str, Any]:
        """Which tokens are of images."""
        return {"mm_token_type_ids": seen}


class SquareProcessor(Processor):
    """The same for a model whose images have one size: 16 tokens each, which see one another."""

    def seen(self, images: list[Any]) -> tuple[dict[str, Any], list[int]]:
        pixels = [torch.frombuffer(bytearray(one.resize((16, 16)).tobytes()), dtype=torch.uint8) for one in images]
        values = torch.stack([one.view(16, 16, 3).permute(2, 0, 1) / 127.5 - 1 for one in pixels])
        return {"pixel_values": values}, [16] * len(images)

    def told(self, seen: torch.Tensor) -> dict[str, Any]:
        return {"token_type_ids": seen}


def seeing_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(kind: str, directory: Path) -> type[Processor]:
    """Make a tiny random model of a kind; what makes its input."""
    torch.manual_seed(0)
    tokenizer = seeing_tokenizer()
    model = {"qwen2_vl": _qwen2_vl, "qwen3_vl": _qwen3_vl, "gemma3": _gemma3}[kind](len(tokenizer), tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return SquareProcessor if kind == "gemma3" else Processor


def _tokens(tokenizer: Any) -> dict[str, int]:
    start, image, end, video = tokenizer.convert_tokens_to_ids(MARKS)
    return {
        "image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end,
    }  # fmt: skip


def _rope(**others: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3], **others}


def _qwen2_vl(vocabulary: int, tokenizer: Any) -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "initializer_range": 0.5}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={"vocab_size": vocabulary, **_TEXT, "rope_parameters": _rope()}, vision_config=vision,
            **_tokens(tokenizer), tie_word_embeddings=False, initializer_range=0.5,
        )
    )  # fmt: skip


def _qwen3_vl(vocabulary: int, tokenizer: Any) -> Any:
    """Its first layer adds what is seen once more."""
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4,
        "num_position_embeddings": 64, "initializer_range": 0.5, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {"vocab_size": vocabulary, **_TEXT, "head_dim": 16, "rope_parameters": _rope(mrope_interleaved=True)}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text, vision_config=vision, **_tokens(tokenizer), tie_word_embeddings=False,
            initializer_range=0.5,
        )
    )  # fmt: skip


def _gemma3(vocabulary: int, tokenizer: Any) -> Any:
    """Tokens of an image see one another, in a layer whose window is shorter as well."""
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "initializer_range": 0.5,
    }  # fmt: skip
    text = {
        "vocab_size": vocabulary, **_TEXT, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    tokens = _tokens(tokenizer)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=tokens["image_token_id"],
            boi_token_index=tokens["vision_start_token_id"], eoi_token_index=tokens["vision_end_token_id"],
            tie_word_embeddings=False, initializer_range=0.5,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, 0.5)
        model.lm_head.weight.normal_(0, 0.5)
    return model


def expected(directory: Path, made: type[Processor], words: str, images: list[bytes], count: int) -> list[int]:
    """What transformers' own generate makes of it alone."""
    processor = made(seeing_tokenizer())
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    if images:
        inputs = processor([words], [Image.open(io.BytesIO(data)).convert("RGB") for data in images])
    else:
        inputs = {"input_ids": torch.tensor([processor.tokenizer(words)["input_ids"]])}
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens
