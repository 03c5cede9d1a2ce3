"""Classifiers, cross-encoders and reward models: what transformers and sentence-transformers make of each text alone."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.backends.test_sentences import checkpoint, load
from tests.backends.tiny import byte_tokenizer
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import (
    ConfigurationError,
    ContextOverflowError,
    RequestError,
    UnsupportedOperationError,
)
from zfabric.testing import conformance
from zfabric.wire.tasks import ClassifyRequest, EmbedRequest, EmbedTokensRequest, RewardRequest, ScoreRequest

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
BART = {
    "vocab_size": 259, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "bos_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 1, "init_std": 0.5,
}  # fmt: skip
#: An encoder that tells two texts apart, one that does not, decoders with and without a padding token, and both in one.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", SMALL),
    "distilbert": ("DistilBertConfig", {"vocab_size": 259, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "llama": ("LlamaConfig", SMALL),
    "qwen2 without padding": ("Qwen2Config", {**SMALL, "num_key_value_heads": 2, "pad_token_id": None}),
    "gpt2": ("GPT2Config", {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "bart": ("BartConfig", BART),
    "t5": (
        "T5Config",
        {
            "vocab_size": 259,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "eos_token_id": 1,
            "decoder_start_token_id": 2,
        },
    ),
    "deberta": (
        "DebertaV2Config",
        {**SMALL, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "modernbert": (
        "ModernBertConfig",
        {**SMALL, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1},
    ),
}
TEXTS = ["good", "a rather long text, which is neither good nor bad", "ugly"]


def save(directory: Path, family: str, labels: list[str], **more: Any) -> Path:
    """A tiny random model with a head, and a tokenizer that puts a pair together as BERT's does."""
    torch.manual_seed(0)
    name, settings = FAMILIES[family]
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    config = getattr(transformers, name)(**{"pad_token_id": 2, "initializer_range": 0.5, **settings, **named, **more})
    model = getattr(transformers, name.replace("Config", "ForSequenceClassification"))(config)
    model.save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(directory)
    return directory


def logits(directory: Path, *texts: str | tuple[str, str]) -> torch.Tensor:
    """What transformers computes of each, alone."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    typed = "token_type_ids" in inspect.signature(model.forward).parameters
    rows = []
    for text in texts:
        both = (text,) if isinstance(text, str) else text
        with torch.inference_mode():
            inputs = tokenizer(*both, return_tensors="pt", return_token_type_ids=typed)
            rows.append(model(**inputs).logits[0])
    return torch.stack(rows)


async def scores(worker: ModelWorker, query: str, *documents: str) -> list[float]:
    return await worker.score(ScoreRequest(query=query, documents=list(documents)))


@pytest.mark.parametrize("family", FAMILIES)
async def test_classes_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path, family, ["bad", "good", "ugly"])
    worker, info = await load(directory)
    asked: list[str | list[str]] = [*TEXTS, ["a premise", "and what follows"]]
    together, alone = await asyncio.gather(
        worker.classify(ClassifyRequest(inputs=asked)), worker.classify(ClassifyRequest(inputs=["ugly"]))
    )
    with pytest.raises(RequestError, match="gives 3 classes"):
        await scores(worker, "a query", "a document")
    with pytest.raises(UnsupportedOperationError, match="no rewards"):
        await worker.reward(RewardRequest(inputs=["x"]))
    await worker.close()
    assert info.capabilities == ["classify", "count_tokens", "tokenize", "detokenize"]
    assert (info.dimensions, info.details["classes"]) == (0, 3)
    right = logits(directory, *TEXTS, ("a premise", "and what follows")).softmax(-1)
    torch.testing.assert_close(torch.tensor(together.probabilities), right, atol=1e-4, rtol=1e-3)
    assert together.labels == alone.labels == ["bad", "good", "ugly"]
    assert alone.probabilities[0] == pytest.approx(right[2].tolist(), abs=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2 without padding"])
async def test_one_label_scores_and_rewards(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path, family, ["worth"])
    worker, info = await load(directory)
    found = await scores(worker, "a query", *TEXTS)
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rewards = await worker.reward(RewardRequest(inputs=[TEXTS[0], chat]))
    classes = await worker.classify(ClassifyRequest(inputs=[["a query", TEXTS[1]]]))
    with pytest.raises(ContextOverflowError):
        await scores(worker, "a query", "long " * 200)
    await worker.close()
    assert info.capabilities == ["classify", "score", "reward", "count_tokens", "tokenize", "detokenize"]
    right = logits(directory, *(("a query", text) for text in TEXTS)).sigmoid().flatten()
    torch.testing.assert_close(torch.tensor(found), right, atol=1e-4, rtol=1e-3)
    assert classes.probabilities == [[pytest.approx(right[1].item(), abs=1e-4)]]
    torch.testing.assert_close(torch.tensor(rewards[0]), logits(directory, TEXTS[0])[0], atol=1e-4, rtol=1e-3)
    # The template writes what a chat begins with; no special tokens are put around it.
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    written = AutoTokenizer.from_pretrained(directory).apply_chat_template(chat, return_tensors="pt")
    with torch.inference_mode():
        assert rewards[1] == pytest.approx(model(written["input_ids"]).logits[0].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, torch.nn.Identity()),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, torch.nn.Identity()),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}, torch.tanh),
    ],
)
async def test_the_activation_is_the_models_own(settings: dict[str, Any], activation: Any, tmp_path: Path) -> None:
    directory = save(tmp_path, "bert", ["bad", "good"], **settings)
    worker, _ = await load(directory)
    found = await worker.classify(ClassifyRequest(inputs=list(TEXTS)))
    await worker.close()
    right = activation(logits(directory, *TEXTS))
    torch.testing.assert_close(torch.tensor(found.probabilities), right, atol=1e-3, rtol=1e-3)


async def test_an_activation_of_others_is_refused(tmp_path: Path) -> None:
    settings = {"activation_fn": "somewhere.else.Activation"}
    with pytest.raises(ConfigurationError, match=r"'somewhere\.else\.Activation', it must be one of torch\.nn"):
        await load(save(tmp_path, "bert", ["worth"], sentence_transformers=settings))


async def test_a_head_that_padding_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 259, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    monkeypatch.setitem(FAMILIES, "xlnet", ("XLNetConfig", small))
    with pytest.raises(ConfigurationError, match="answers otherwise in a batch than alone"):
        await load(save(tmp_path, "xlnet", ["bad", "good", "ugly"]))


async def test_a_model_with_a_head_makes_no_vectors(tmp_path: Path) -> None:
    worker, info = await load(save(tmp_path, "bert", ["worth"]))
    assert "embed" not in info.capabilities
    for call in (worker.embed(EmbedRequest(inputs=["x"])), worker.embed_tokens(EmbedTokensRequest(inputs=["x"]))):
        with pytest.raises(UnsupportedOperationError, match="judges texts"):
            await call
    await worker.close()


def cross_encoder(directory: Path, minilm: Path, activation: str, labels: int) -> Path:
    """MiniLM's weights with a head made of formulas, as sentence-transformers 6.2.0 saves a CrossEncoder."""
    shutil.copytree(minilm, directory, ignore=shutil.ignore_patterns("1_Pooling", "modules.json", "*.md", "*sentence*"))
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=labels, dtype=torch.float32)
    values = torch.sin(torch.arange(labels * 384, dtype=torch.float32)).reshape(labels, 384)
    model.classifier.weight.data, model.classifier.bias.data = values, torch.linspace(-1, 1, labels)
    model.save_pretrained(directory)
    whole: dict[str, Any] = {
        "model_type": "CrossEncoder",
        "activation_fn": activation,
        "prompts": {},
        "default_prompt_name": None,
    }
    (directory / "config_sentence_transformers.json").write_text(json.dumps(whole))
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    (directory / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"transformer_task": "sequence-classification"}))
    return directory


PAIRS = [("What is a cat?", "A small pet."), ("What is a cat?", "Quarterly revenue grew"), ("one", "two " * 30)]
#: What the library's `predict(PAIRS)` gives.
PREDICTED: dict[str, list[list[float]]] = {
    "torch.nn.modules.activation.Sigmoid": [[0.305115], [0.437494], [0.299736]],
    "torch.nn.modules.linear.Identity": [
        [-0.823057, 1.176476, 2.583154],
        [-0.251339, 2.013682, 3.263959],
        [-0.848556, 1.444684, 3.009912],
    ],
}


@pytest.mark.parametrize("activation", PREDICTED)
async def test_scores_are_those_of_sentence_transformers(activation: str, minilm: Path, tmp_path: Path) -> None:
    labels = len(PREDICTED[activation][0])
    worker, _ = await load(cross_encoder(tmp_path / "model", minilm, activation, labels))
    found = await worker.classify(ClassifyRequest(inputs=[list(pair) for pair in PAIRS]))
    if labels == 1:
        assert await scores(worker, PAIRS[0][0], PAIRS[0][1], PAIRS[1][1]) == pytest.approx(
            [row[0] for row in PREDICTED[activation][:2]], abs=2e-5
        )
    await worker.close()
    torch.testing.assert_close(
        torch.tensor(found.probabilities), torch.tensor(PREDICTED[activation]), atol=2e-5, rtol=1e-4
    )


async def test_it_keeps_what_a_backend_promises(tmp_path: Path) -> None:
    directory = save(tmp_path, "bert", ["worth"])
    await conformance(ModelWorker(TransformersOptions(model=str(directory), device="cpu", dtype="float32")))


async def test_checkpoints_with_many_vectors_of_a_text_are_refused(minilm: Path, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", minilm, "plain")
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "MultiVectorEncoder"}))
    with pytest.raises(ConfigurationError, match="is a MultiVectorEncoder of sentence-transformers"):
        await load(directory)
