"""A tiny Whisper of random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests.backends.tiny import byte_tokenizer
from tests.voices import RATE

SECONDS = 2
LANGUAGES = {"<|en|>": 260, "<|de|>": 261, "<|fr|>": 262}
TASKS = {"translate": 263, "transcribe": 264}
UNTIMED = 266
_SPECIAL = [
    "<|startoftranscript|>", *LANGUAGES, "<|translate|>", "<|transcribe|>", "<|startofprev|>", "<|notimestamps|>",
]  # fmt: skip


def save_whisper(directory: Path) -> Path:
    """Two layers on each side, that hear two seconds at once; bytes are its tokens."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    assert tokenizer.convert_tokens_to_ids("<|notimestamps|>") == UNTIMED
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, init_std=0.5,
        max_source_positions=50 * SECONDS, max_target_positions=64, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=1, pad_token_id=1, decoder_start_token_id=259, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    said = {
        "lang_to_id": LANGUAGES, "task_to_id": TASKS, "no_timestamps_token_id": UNTIMED, "is_multilingual": True,
        "prev_sot_token_id": 265, "max_length": 40, "suppress_tokens": [70, 71, *range(259, 267)],
        "begin_suppress_tokens": [1], "return_timestamps": False,
    }  # fmt: skip
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    # Else it is made anew of the model's configuration.
    model.generation_config._from_model_config = False
    model.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@functools.cache
def _loaded(directory: Path) -> tuple[Any, Any, Any]:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(directory, dtype=torch.float32).eval()
    return model, WhisperFeatureExtractor.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


def transcribed(directory: Path, samples: np.ndarray, prompt: str | None = None, **options: Any) -> list[int]:
    """Tokens that transformers' own `generate` makes of samples at RATE, without those that it begins with."""
    model, extractor, tokenizer = _loaded(directory)
    features = extractor(samples.astype(np.float32), sampling_rate=RATE, return_tensors="pt").input_features
    if prompt is not None:
        tokens = tokenizer("<|startofprev|> " + prompt, add_special_tokens=False)["input_ids"]
        options["prompt_ids"] = torch.tensor(tokens)
    made: list[int] = model.generate(features, do_sample=False, **options)[0].tolist()
    # Some versions give back what an answer begins with.
    return made[made.index(UNTIMED) + 1 :] if UNTIMED in made else made
