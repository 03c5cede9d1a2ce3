"""Tiny random models, made on the spot: a Llama over bytes, and tokenizers of both great families."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zfabric.errors import FabricError
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.sampling import SamplingParams

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def byte_tokenizer() -> Any:
    """Byte-level: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def fallback_tokenizer() -> Any:
    """As SentencePiece does it: words with a leading mark, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁he", "llo", "▁wor", "ld", "é"]
    pieces += list("abcdefghijklmnopqrstuvwxyz.,")
    inner = Tokenizer(
        BPE(
            vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"
        )
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram_tokenizer() -> Any:
    """As T5 has it: likelihoods instead of merges, and spaces made of marks."""
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        "▁the",
        "▁a",
        "s",
        "ing",
        "▁walk",
        "é",
        "世界",
        *"abcdefghijklmnopqrstuvwxyz.,!",
    ]
    inner = Tokenizer(Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def save_llama(directory: Path, positions: int = 512, *, heads: int = 4) -> Path:
    """Two layers of random weights. Untied and widely spread, or it would repeat one token for ever.

    Args:
        positions: Longest context.
        heads: They share 64 dimensions. Some kernels want 32 of them at least.
    """
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@functools.cache
def _loaded(directory: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(directory), model.eval()


@functools.cache
def reference(directory: Path, prompt: str, count: int) -> list[int]:
    """What transformers' own generate makes of a prompt alone, greedily."""
    tokenizer, model = _loaded(directory)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


class Answers:
    """A step sink that collects, for tests without a fabric."""

    def __init__(self) -> None:
        self.deltas: dict[str, list[Delta]] = {}
        self.errors: dict[str, FabricError] = {}
        #: Tokens that came as columns, by request.
        self.plain: Counter[str] = Counter()
        self.largest_step = 0
        self.died: FabricError | None = None
        self.logged: list[str] = []
        self._changed = asyncio.Event()

    def emit(self, step: Iterable[tuple[str, Delta]]) -> None:
        lines = list(step)
        self.largest_step = max(self.largest_step, len({request_id for request_id, _ in lines}))
        for request_id, delta in lines:
            self.deltas.setdefault(request_id, []).append(delta)
        self._changed.set()

    def emit_columns(
        self,
        request_ids: Sequence[str],
        token_ids: Sequence[int],
        texts: Sequence[str],
        others: Iterable[tuple[str, Delta]] = (),
    ) -> None:
        plain = [
            (request_id, Delta(text=text, token_ids=[token]))
            for request_id, token, text in zip(request_ids, token_ids, texts, strict=True)
        ]
        self.plain.update(request_ids)
        self.emit([*plain, *others])

    def emit_columns_threadsafe(self, *step: object) -> None:
        raise AssertionError(step)

    def fail(self, request_id: str, error: FabricError) -> None:
        self.errors[request_id] = error
        self._changed.set()

    def emit_threadsafe(self, step: Iterable[tuple[str, Delta]]) -> None:
        raise AssertionError(step)

    def fail_threadsafe(self, request_id: str, error: FabricError) -> None:
        raise AssertionError(error)

    def models_changed(self, models: Sequence[ModelInfo]) -> None:
        raise AssertionError("nothing here changes its models")

    def cache_changed_threadsafe(self, model: str, *changes: object, **values: object) -> None:
        raise AssertionError("nothing here tells of its cache")

    def log(self, event: str, **fields: object) -> None:
        self.logged.append(event)

    def engine_died(self, error: FabricError) -> None:
        self.died = error
        self._changed.set()

    def ended(self, request_id: str) -> bool:
        deltas = self.deltas.get(request_id, [])
        return request_id in self.errors or (bool(deltas) and deltas[-1].usage is not None)

    async def until(self, *request_ids: str, tokens: int | None = None) -> None:
        """Wait until these have ended, or have so many tokens."""
        while not all(
            self.ended(name) or (tokens is not None and len(self.tokens(name)) >= tokens) for name in request_ids
        ):
            assert self.died is None, self.died
            self._changed.clear()
            await self._changed.wait()

    async def death(self) -> None:
        """Wait until the engine has died."""
        while self.died is None:
            self._changed.clear()
            await self._changed.wait()

    def text(self, request_id: str, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas.get(request_id, []) if delta.index == index)

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [t for delta in self.deltas.get(request_id, []) if delta.index == index for t in delta.token_ids]

    def last(self, request_id: str) -> Delta:
        return self.deltas[request_id][-1]


def ask(name: str, prompt: str = "Hello there", **sampling: Any) -> GenerateRequest:
    """A request for tests."""
    resume_token_ids = sampling.pop("resume_token_ids", [])
    resume_characters = sampling.pop("resume_characters", 0)
    return GenerateRequest(
        prompt=prompt,
        request_id=name,
        sampling=SamplingParams(**sampling),
        resume_token_ids=resume_token_ids,
        resume_characters=resume_characters,
    )
