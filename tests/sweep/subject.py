"""One architecture: a tiny random model of it, asked through ModelWorker and through transformers itself."""

from __future__ import annotations

import asyncio
import copy
import re
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers

from tests.backends.tiny import Answers, ask, byte_tokenizer
from tests.sweep.overrides import OVERRIDES
from tests.sweep.tiny_config import shrink
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, FabricError
from zfabric.wire.tasks import EmbedRequest

Kind = Literal["causal", "vision", "paired", "encoder"]
#: "same": what transformers itself says. "refused": by name, at loading. "wrong": anything else.
#: "not made": no tiny model of it could be made, so nothing is known.
Verdict = Literal["same", "refused", "wrong", "not made"]
FACTORIES: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "vision": "AutoModelForImageTextToText",
    "paired": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModel",
}
_NO_PROCESSOR = re.compile(r"(image|video) processor|PixtralProcessor")
PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog", "a", "Once upon"]
TOKENS = 16
#: A model whose answers have fewer different tokens says little by them, so others are drawn, up to so many.
SEVERAL = 4
_SEEDS = 4
FLAT = "but its answers have few different tokens"


class Finding(NamedTuple):
    """What became of one architecture."""

    architecture: str
    kind: Kind
    verdict: Verdict
    reason: str = ""


def examine(architecture: str, kind: Kind) -> Finding:
    """Make the model, serve it, and compare."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            for seed in range(_SEEDS):
                torch.manual_seed(seed)
                save(architecture, kind, directory)
                expected = by_transformers(kind, directory)
                if kind == "encoder" or varied(expected):
                    break
        except Exception as error:  # noqa: BLE001 — whatever stops a tiny model from being made
            return Finding(architecture, kind, "not made", _brief(error))
        try:
            found = asyncio.run(by_worker(kind, directory))
        except ConfigurationError as error:
            # Nobody but the model's makers can make the processor that turns images into its input.
            verdict: Verdict = "not made" if _NO_PROCESSOR.search(str(error)) else "refused"
            return Finding(architecture, kind, verdict, _brief(error).replace(name, "…"))
        except Exception as error:  # noqa: BLE001 — a worker that does not load and does not say why by its own error
            return Finding(architecture, kind, "wrong", _brief(error))
        return _compare(architecture, kind, expected, found)


def save(architecture: str, kind: Kind, directory: Path) -> None:
    """A tiny random model and a byte-level tokenizer."""
    default = transformers.AutoConfig.for_model(architecture.partition("+")[0])
    values = shrink(default.to_dict(), OVERRIDES.get(architecture))
    config = type(default).from_dict(values)
    model = getattr(transformers, FACTORIES[kind]).from_config(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 20_000_000:
        raise ValueError(f"it has {size} parameters")
    _spread(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def _spread(model: Any) -> None:
    """Let outputs differ from token to token: a random model with small weights says the same for ever."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and getattr(head, "weight", None) is not None:
        with torch.no_grad():
            head.weight.mul_(3.0)


def by_transformers(kind: Kind, directory: Path) -> list[Any]:
    """The answer to each prompt alone."""
    factory = getattr(transformers, FACTORIES[kind])
    model = factory.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    answers: list[Any] = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        # Another copy for each: a model that keeps a state in its modules does not forget the prompt before.
        alone = copy.deepcopy(model)
        with torch.inference_mode():
            if kind == "encoder":
                hidden = alone(**inputs).last_hidden_state[0].mean(dim=0)
                answers.append((hidden / hidden.norm()).numpy())
                continue
            # One beam, whatever a model would take: a batch searches only where a request asks for it.
            output = alone.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=2
            )
        skip = 1 if getattr(model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
        answers.append(output[0, skip:].tolist())
    return answers


async def by_worker(kind: Kind, directory: Path) -> list[Any]:
    """The same from a batch that all of them share."""
    options = TransformersOptions(model=str(directory), dtype="float32", device="cpu", prefill_chunk_tokens=16)
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    try:
        await worker.load()
        if kind == "encoder":
            result = await worker.embed(EmbedRequest(inputs=list(PROMPTS)))
            return list(np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions))
        for prompt in PROMPTS:
            worker.begin(ask(prompt, prompt, temperature=0, max_new_tokens=TOKENS, ignore_eos=True))
            await asyncio.wait_for(answers.until(prompt, tokens=2), 60)
        await asyncio.wait_for(answers.until(*PROMPTS), 60)
        for error in answers.errors.values():
            raise error
        return [answers.tokens(prompt) for prompt in PROMPTS]
    finally:
        await worker.close()


def _compare(architecture: str, kind: Kind, expected: list[Any], found: list[Any]) -> Finding:
    for prompt, wanted, got in zip(PROMPTS, expected, found, strict=True):
        if kind == "encoder":
            difference = float(np.abs(wanted - got).max()) if wanted.shape == got.shape else float("inf")
            if not difference < 1e-4:
                return Finding(architecture, kind, "wrong", f"{prompt!r}: differs by {difference:.2g}")
        elif wanted != got:
            place = next(
                (n for n, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got))
            )
            return Finding(architecture, kind, "wrong", f"{prompt!r}: token {place} of {len(wanted)} differs")
    return Finding(architecture, kind, "same", "" if kind == "encoder" or varied(expected) else FLAT)


def varied(answers: list[list[int]]) -> bool:
    """Whether half of the answers have several different tokens at least."""
    return 2 * sum(len(set(tokens)) >= SEVERAL for tokens in answers) >= len(answers)


def _brief(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if not isinstance(error, FabricError) else str(error)
    return " ".join(text.split())[:200]
