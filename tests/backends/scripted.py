"""Models that write what a test has them write: a GPT-2 whose positions alone say which token comes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import GPT2Config, GPT2LMHeadModel

from tests.backends.tiny import byte_tokenizer

POSITIONS = 640
#: Writes earlier turns as Hermes does, and so tells which parsers there are for it.
TEMPLATE = (
    "{%- for tool in tools or [] %}{{ tool.function.name }} {% endfor -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{%- for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>\n{% endfor -%}'
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}{% endif -%}"
    "{#- </think> ends what the model thinks -#}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")


def tokenizer() -> Any:
    """Bytes, and the marks as special tokens."""
    made = byte_tokenizer()
    made.add_tokens([AddedToken(mark, special=True) for mark in SPECIAL])
    made.chat_template = TEMPLATE
    made.model_max_length = POSITIONS
    return made


def prompt_tokens(conversation: list[dict[str, Any]], **template: Any) -> list[int]:
    """The prompt of a chat."""
    text = tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **template)
    ids: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def save_scripted(directory: Path, scripts: Mapping[int, str]) -> Path:
    """A model that writes these texts after prompts of so many tokens, and then ends; at any other place it writes a dot.

    Hidden states are positions, one dimension for each: layers add nothing to them, and the head reads off the token.
    """
    words = tokenizer()
    config = GPT2Config(
        vocab_size=len(words), n_positions=POSITIONS, n_embd=POSITIONS, n_layer=1, n_head=POSITIONS // 64, n_inner=8,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    places = [words.convert_tokens_to_ids(".")] * POSITIONS
    for length, text in scripts.items():
        tokens = [*words(text, add_special_tokens=False)["input_ids"], 1]
        assert {*places[length - 1 : length - 1 + len(tokens)]} == {places[-1]}, "scripts overlap"
        places[length - 1 : length - 1 + len(tokens)] = tokens
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(POSITIONS))
        model.lm_head.weight[places, range(POSITIONS)] = 1.0
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
