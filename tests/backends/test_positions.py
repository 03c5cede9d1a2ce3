"""Models whose positions have a time, a height and a width: a tiny Qwen2-VL in a running batch, and a tiny Qwen3.5, whose layers
keep states besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from tests.backends.pictures import ask, chat, png, text
from tests.backends.seeing import IMAGE, MARKS, Processor, expected, save, seeing_tokenizer
from tests.backends.tiny import Answers
from zfabric.backends.hf_transformers.loading import model_loader
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen2-VL."""
    directory = tmp_path_factory.mktemp("tiny-qwen")
    save("qwen2_vl", directory)
    return directory


@pytest.fixture(scope="module")
def tiny_qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen3.5, with a layer of linear attention before one of attention."""
    directory = tmp_path_factory.mktemp("tiny-qwen3-5")
    torch.manual_seed(0)
    tokenizer = seeing_tokenizer()
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
    assert answers.tokens("text") == expected(tiny_qwen, Processor, "What?:", [], 30)
    assert answers.tokens("wide") == expected(tiny_qwen, Processor, f"{IMAGE}What?:", [wide], 24)
    assert (
        answers.tokens("high", 0)
        == answers.tokens("high", 1)
        == expected(tiny_qwen, Processor, f"Now{IMAGE}?:", [high], 16)
    )
    assert len(answers.tokens("search", 0)) == 8
