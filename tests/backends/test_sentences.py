"""Checkpoints of sentence-transformers: the vectors that its own library makes, recorded from version 6.2.0."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel

from tests.backends.test_embedding import vectors
from tests.backends.tiny import Answers, byte_tokenizer, unigram_tokenizer
from zfabric.backends.front.sentence_files import SentenceFiles, Step
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.pooling.poolers import make_pooler
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, ParameterRangeError, RequestError, UnsupportedOperationError
from zfabric.wire.messages import ModelInfo
from zfabric.wire.tasks import ClassifyRequest, EmbedTokensRequest, ScoreRequest

TEXTS = ["A small cat", "Quarterly REVENUE grew", "word " * 60]
POOLING = "sentence_transformers.models.Pooling"
DENSE = {
    "in_features": 384,
    "out_features": 6,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
#: What the library's `encode(TEXTS)` gives, three numbers of each text, the first, the middle and the last.
RECORDED: dict[str, list[list[float]]] = {
    "plain": [
        [0.132768, 0.081109, 0.041345],
        [0.041235, -0.110513, -0.044352],
        [0.032062, 0.055290, 0.029221],
    ],
    "dense": [
        [0.429234, -0.366429, -0.429145],
        [0.356199, 0.466982, -0.466556],
        [0.418348, 0.065373, -0.461559],
    ],
    "residual": [
        [0.042785, 0.077343, 0.090169],
        [0.025102, 0.007216, 0.051243],
        [0.024917, 0.063619, 0.089601],
    ],
    "several": [
        [0.053210, 0.059883, 0.017513],
        [0.008379, -0.026713, -0.019347],
        [0.018747, 0.026626, 0.006992],
    ],
    "weighted": [
        [0.056755, 0.120138, 0.037412],
        [0.020372, 0.037241, -0.040057],
        [0.006243, 0.031519, 0.028727],
    ],
    "prompted": [
        [0.130083, 0.066993, 0.075834],
        [0.050296, -0.106530, 0.002653],
        [0.038055, 0.079122, 0.064032],
    ],
    "without its prompt": [
        [0.120352, 0.052248, 0.019702],
        [0.035806, -0.135597, -0.071634],
        [0.017045, 0.070151, 0.018489],
    ],
    "lower": [
        [0.132768, 0.081109, 0.041345],
        [0.041235, -0.110513, -0.044352],
        [0.032062, 0.055290, 0.029221],
    ],
}

#: The same of "prompted", with the prompt that is called "passage".
PASSAGES = [
    [0.094100, 0.070765, -0.018975],
    [-0.000779, -0.096864, -0.041546],
    [0.004291, 0.099674, -0.005414],
]


def checkpoint(directory: Path, minilm: Path, name: str) -> Path:
    """MiniLM's weights with other files around them. Made up of formulas: the same wherever it is made."""
    files: dict[str, dict[str, Any]] = {"pooling": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True}}
    whole: dict[str, Any] = {"__version__": {"sentence_transformers": "2.0.0"}}
    text: dict[str, Any] = {"max_seq_length": 32, "do_lower_case": False}
    later: list[tuple[str, dict[str, Any]]] = []
    if name == "dense":
        later = [("Dense", DENSE), ("Normalize", {})]
    elif name == "residual":
        squared = {**DENSE, "out_features": 384, "use_residual": True, "bias": False}
        later = [("Dense", squared), ("LayerNorm", {"dimension": 384})]
    elif name == "several":
        files["pooling"] |= {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}
    elif name == "weighted":
        files["pooling"] = {"embedding_dimension": 384, "pooling_mode": ["weightedmean", "mean_sqrt_len_tokens"]}
    elif name == "prompted":
        whole |= {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"}
    elif name == "without its prompt":
        whole |= {"prompts": {"query": "Represent this: "}, "default_prompt_name": "query"}
        files["pooling"]["include_prompt"] = False
    elif name == "lower":
        text["do_lower_case"] = True
    shutil.copytree(minilm, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("1_Pooling", "*.md"))
    if name == "lower":
        _tell_cases_apart(directory)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    steps = [("Pooling", files["pooling"]), *later]
    for index, (kind, settings) in enumerate(steps, start=1):
        path = directory / f"{index}_{kind}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(settings))
        modules.append(
            {"idx": index, "name": str(index), "path": path.name, "type": f"sentence_transformers.models.{kind}"}
        )
        if kind in ("Dense", "LayerNorm"):
            save_file(_weights(kind, settings), path / "model.safetensors")
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "sentence_bert_config.json").write_text(json.dumps(text))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(whole))
    return directory


def _tell_cases_apart(directory: Path) -> None:
    """MiniLM's tokenizer puts texts in lower case by itself; this one does not."""
    path = directory / "tokenizer.json"
    inner = json.loads(path.read_text())
    inner["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(inner))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))


def _weights(kind: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    if kind == "LayerNorm":
        size = settings["dimension"]
        return {"norm.weight": torch.linspace(0.5, 1.5, size), "norm.bias": torch.linspace(-0.1, 0.1, size)}
    inputs, outputs = settings["in_features"], settings["out_features"]
    weight = torch.sin(torch.arange(inputs * outputs, dtype=torch.float32)).reshape(outputs, inputs)
    return {"linear.weight": weight} | ({"linear.bias": torch.linspace(-1, 1, outputs)} if settings["bias"] else {})


async def load(directory: Path | str, **options: Any) -> tuple[ModelWorker, ModelInfo]:
    worker = ModelWorker(TransformersOptions(model=str(directory), device="cpu", dtype="float32", **options))
    worker.steps = Answers()
    (info,) = await worker.load()
    return worker, info


@pytest.mark.parametrize("name", RECORDED)
async def test_vectors_are_those_of_the_library(name: str, minilm: Path, tmp_path: Path) -> None:
    worker, info = await load(checkpoint(tmp_path / "model", minilm, name))
    found = await vectors(worker, *TEXTS, truncate="cut")
    await worker.close()
    assert info.dimensions == found.shape[1]
    columns = [0, found.shape[1] // 2, found.shape[1] - 1]
    np.testing.assert_allclose(found[:, columns], RECORDED[name], atol=2e-5)


async def test_a_prompt_is_called_by_its_name(minilm: Path, tmp_path: Path) -> None:
    worker, info = await load(checkpoint(tmp_path / "model", minilm, "prompted"))
    passages = await vectors(worker, *TEXTS, truncate="cut", prompt_name="passage")
    queries = await vectors(worker, *TEXTS, truncate="cut", prompt_name="query")
    with pytest.raises(ParameterRangeError, match="'title', it must be one of passage, query"):
        await vectors(worker, "x", prompt_name="title")
    with pytest.raises(RequestError, match="input 0 is tokens"):
        await vectors(worker, [1, 2], prompt_name="query")
    await worker.close()
    assert (info.details["prompts"], info.details["prompt_name"]) == ("passage, query", "query")
    np.testing.assert_allclose(passages[:, [0, 192, 383]], PASSAGES, atol=2e-5)
    np.testing.assert_allclose(queries[:, [0, 192, 383]], RECORDED["prompted"], atol=2e-5)


async def test_each_token_has_its_hidden_state_and_scores_are_cosines(minilm: Path) -> None:
    worker, info = await load(minilm)
    tokens, whole, cut = await asyncio.gather(
        worker.embed_tokens(EmbedTokensRequest(inputs=list(TEXTS), normalize=False)),
        vectors(worker, *TEXTS),
        worker.embed_tokens(EmbedTokensRequest(inputs=["word " * 600], truncate="cut", dimensions=8)),
    )
    scores = await worker.score(ScoreRequest(query=TEXTS[0], documents=TEXTS[1:]))
    with pytest.raises(ParameterRangeError, match="has none"):
        await worker.embed_tokens(EmbedTokensRequest(inputs=["x"], prompt_name="query"))
    with pytest.raises(UnsupportedOperationError, match="no head"):
        await worker.classify(ClassifyRequest(inputs=["x"]))
    await worker.close()
    assert {"embed", "embed_tokens", "score"} < set(info.capabilities)
    assert scores == pytest.approx((whole[1:] @ whole[0]).tolist(), abs=1e-5)
    assert (cut.tokens, cut.dimensions) == ([info.context_length], 8)
    np.testing.assert_allclose(np.linalg.norm(np.frombuffer(cut.data, "<f4").reshape(-1, 8), axis=1), 1, atol=1e-5)
    rows = np.split(np.frombuffer(tokens.data, "<f4").reshape(-1, 384), np.cumsum(tokens.tokens)[:-1])
    model, tokenizer = AutoModel.from_pretrained(minilm, dtype=torch.float32), AutoTokenizer.from_pretrained(minilm)
    for text, found in zip(TEXTS, rows, strict=True):
        with torch.inference_mode():
            right = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(found, right.numpy(), atol=1e-4)


async def test_a_name_at_a_hub_means_the_same_as_its_directory(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--some--one"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    checkpoint(home / "snapshots" / ("0" * 40), minilm, "dense")
    worker, info = await load("some/one")
    found = await vectors(worker, *TEXTS, truncate="cut")
    await worker.close()
    assert (info.dimensions, info.context_length) == (6, 32)
    np.testing.assert_allclose(found[:, [0, 3, 5]], RECORDED["dense"], atol=2e-5)
    # Whoever has the model alone, and no connection, cannot know how its vectors are made.
    for left in ("modules.json", "config_sentence_transformers.json"):
        (home / "snapshots" / ("0" * 40) / left).unlink()
    with pytest.raises(ConfigurationError, match="--pooling"):
        await load("some/one")
    worker, info = await load("some/one", pooling="mean")
    await worker.close()
    assert info.dimensions == 384


async def test_a_pooling_of_the_request_goes_through_the_same_steps(minilm: Path, tmp_path: Path) -> None:
    worker, _ = await load(checkpoint(tmp_path / "one", minilm, "dense"))
    found = await vectors(worker, "A small cat", pooling="cls", normalize=False)
    await worker.close()
    hidden = AutoModel.from_pretrained(minilm)(
        **AutoTokenizer.from_pretrained(minilm)("A small cat", return_tensors="pt")
    )
    weights = _weights("Dense", DENSE)
    expected = torch.tanh(weights["linear.weight"] @ hidden.last_hidden_state[0, 0] + weights["linear.bias"])
    np.testing.assert_allclose(found[0], expected.detach().numpy(), atol=1e-4)
    worker, info = await load(checkpoint(tmp_path / "two", minilm, "several"))
    assert info.details["pooling"] == "cls, max, mean"
    assert (await vectors(worker, "A small cat", pooling="mean")).shape == (1, 384)
    await worker.close()


def test_what_is_not_done_here_is_refused_by_name() -> None:
    pooling = Step("Pooling", {"pooling_mode": "lasttoken"})
    assert make_pooler(SentenceFiles(steps=(pooling,)), 8, "m", None).modes == ("last",)
    assert make_pooler(SentenceFiles(), 8, "m", None).modes == ("mean",)
    assert make_pooler(SentenceFiles(), 8, "m", "cls").modes == ("cls",)
    for steps, words in (
        ((pooling, Step("LSTM", {})), "LSTM"),
        ((Step("SpladePooling", {}),), "SpladePooling"),
        ((), "none after"),
        ((Step("Pooling", {"pooling_mode": "median"}),), "median"),
        ((pooling, Step("Dense", {**DENSE, "activation_function": "os.system"})), "os.system"),
        ((pooling, Step("Dense", {**DENSE, "module_input_name": "token_embeddings"})), "module_input_name"),
        ((pooling, Step("Dense", DENSE)), "weights are not there"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make_pooler(SentenceFiles(steps=steps), 384, "m", None)
    both = make_pooler(SentenceFiles(steps=(Step("Pooling", {"pooling_mode": ["cls", "mean"]}),)), 8, "m", None)
    assert both.dimensions == 16
    both._head = torch.nn.Identity()
    with pytest.raises(ParameterRangeError, match="side by side"):
        both.chosen("last")


SMALL: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def save(directory: Path, architecture: str, **more: Any) -> Path:
    """A tiny random encoder with a tokenizer over bytes, and no files of sentence-transformers."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    kind(kind.config_class(**{**SMALL, **more})).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("architecture", "more", "length"),
    [
        ("BertModel", {}, 40),
        ("BertForMaskedLM", {}, 40),
        ("RobertaModel", {"pad_token_id": 1}, 38),
        ("XLMRobertaModel", {"pad_token_id": 2}, 37),
        ("MPNetModel", {"pad_token_id": 1}, 38),
        ("CamembertModel", {"pad_token_id": 1}, 38),
        ("LongformerModel", {"pad_token_id": 1, "attention_window": 8}, 38),
        ("EsmModel", {"pad_token_id": 1, "position_embedding_type": "absolute"}, 38),
        ("DebertaV2Model", {}, 40),
        ("ElectraModel", {"embedding_size": 16}, 40),
        ("ModernBertModel", {"cls_token_id": 0, "sep_token_id": 1}, 40),
        ("DistilBertModel", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, 40),
    ],
)
async def test_an_encoder_takes_as_many_tokens_as_it_has_places_for(
    architecture: str, more: dict[str, Any], length: int, tmp_path: Path
) -> None:
    directory = save(tmp_path, architecture, **more)
    worker, info = await load(directory)
    tokens = [5 + number % 200 for number in range(length)]
    found = await vectors(worker, tokens, tokens[:7], normalize=False)
    await worker.close()
    assert (info.context_length, info.capabilities) == (
        length,
        ["embed", "embed_tokens", "score", "count_tokens", "tokenize", "detokenize"],
    )
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(directory)(torch.tensor([tokens])).last_hidden_state[0]
    np.testing.assert_allclose(found[0], hidden.mean(dim=0).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "architecture",
    [
        "RobertaForTokenClassification", "BertForQuestionAnswering", "BertForNextSentencePrediction",
    ],
)  # fmt: skip
async def test_a_head_is_not_dropped_without_a_word(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"is a {architecture}.*no embeddings"):
        await load(save(tmp_path, architecture))


@pytest.mark.parametrize("name", ["InternLM2ForRewardModel", "HF_ColBERT", "Qwen2ForProcessRewardModel"])
async def test_a_head_of_others_is_not_dropped_either(name: str, tmp_path: Path) -> None:
    directory = save(tmp_path, "BertModel")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(ConfigurationError, match=name):
        await load(directory)


async def test_a_cross_encoder_of_the_library_is_refused(minilm: Path, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", minilm, "plain")
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    with pytest.raises(ConfigurationError, match="CrossEncoder"):
        await load(directory)


async def test_half_of_an_encoder_decoder_makes_vectors_and_no_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = unigram_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    worker, info = await load(tmp_path)
    found = await vectors(worker, "the walking", "a", normalize=False)
    await worker.close()
    assert info.capabilities == ["embed", "embed_tokens", "score", "count_tokens", "tokenize", "detokenize"]
    with torch.inference_mode():
        model = T5EncoderModel.from_pretrained(tmp_path)
        hidden = model(**tokenizer("the walking", return_tensors="pt", return_token_type_ids=False)).last_hidden_state
    np.testing.assert_allclose(found[0], hidden[0].mean(dim=0).numpy(), atol=1e-5)
