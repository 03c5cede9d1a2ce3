"""Other weights while a worker serves: what they change and when, and that a set that does not fit changes nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.backends.test_architectures import FAMILIES, save
from tests.backends.test_classifiers import save as save_judge
from tests.backends.test_engine import hold, prepared
from tests.backends.tiny import Answers, ask, byte_tokenizer, reference
from tests.backends.told import Told
from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.parameters import packing, weights
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import Delta, OperateRequest
from zfabric.wire.tasks import EmbedRequest

PROMPT = "Once upon a time there was a block of the cache"


class Announcing(Answers):
    """A sink that notes the version that is announced."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: list[Any] = []

    def models_changed(self, models: Any) -> None:
        announced: list[ModelInfo] = list(models)
        self.versions.append(announced[0].details["weight_version"])


Served = tuple[ModelWorker, Announcing]
Start = Callable[..., Awaitable[Served]]


def save_variant(base: Path, directory: Path, seed: int) -> Path:
    """Other random weights of the same model, saved as a trainer would: without a tokenizer."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def steps(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of weights: two other sets for the tiny model, with a tokenizer to make references by."""
    root = tmp_path_factory.mktemp("steps")
    for seed in (1, 2):
        byte_tokenizer().save_pretrained(save_variant(tiny_llama, root / f"step-{seed}", seed))
    return root


@pytest_asyncio.fixture
async def start(tiny_llama: Path, steps: Path) -> AsyncIterator[Start]:
    workers: list[ModelWorker] = []

    async def start_one(**options: Any) -> Served:
        chosen = {
            "model": str(tiny_llama), "dtype": "float32", "device": "cpu", "weights_dir": steps, "weight_version": "zero",
            **options,
        }  # fmt: skip
        worker = ModelWorker(TransformersOptions(**chosen))
        workers.append(worker)
        worker.steps = answers = Announcing()
        await worker.load()
        return worker, answers

    yield start_one
    for worker in workers:
        await worker.close()


async def operate(worker: ModelWorker, call: str, **arguments: Any) -> Any:
    return await worker.operate(OperateRequest(call=call, arguments=arguments))


async def reload(worker: ModelWorker, path: str, version: str = "one", **arguments: Any) -> Any:
    return await operate(worker, "reload_weights", path=path, weight_version=version, **arguments)


def greedy(name: str, count: int = 20, **options: Any) -> Any:
    return ask(name, PROMPT, temperature=0, max_new_tokens=count, ignore_eos=True, **options)


async def said(worker: ModelWorker, answers: Answers, name: str, count: int = 20) -> list[int]:
    worker.begin(greedy(name, count))
    await answers.until(name)
    assert name not in answers.errors
    return answers.tokens(name)


def spans(delta: Delta) -> list[tuple[str, int, int]]:
    assert delta.extra is not None
    return [(one["version"], one["start"], one["end"]) for one in delta.extra["weight_versions"]]


@pytest.mark.parametrize("kind", ["paged", "padded", "packed"])
async def test_answers_are_those_of_a_fresh_worker_with_these_weights(
    start: Start, steps: Path, tiny_llama: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "packed":
        monkeypatch.setattr(packing, "_WEIGHTS_MIN", 1)
    cache = "paged" if kind == "paged" else "padded"
    worker, answers = await start(kv_cache=cache)
    assert worker._assembled is not None
    assert worker._assembled.loaded.model.lm_head.weight.is_mkldnn == (kind == "packed")
    assert await said(worker, answers, "before") == reference(tiny_llama, PROMPT, 20)
    assert spans(answers.last("before")) == [("zero", 0, 20)]
    old = await worker.embed(EmbedRequest(inputs=[PROMPT]))
    told = await reload(worker, "step-1", "step 1")
    assert {name: told[name] for name in ("weight_version", "running")} == {"weight_version": "step 1", "running": 0}
    assert told["tensors"] == len(load_file(steps / "step-1" / "model.safetensors"))
    assert await said(worker, answers, "after") == reference(steps / "step-1", PROMPT, 20)
    # What was cached of the prompt is of other weights.
    usage = answers.last("after").usage
    assert usage is not None
    assert usage.cached_tokens == 0
    assert spans(answers.last("after")) == [("step 1", 0, 20)]
    first = answers.deltas["after"][0].extra
    assert first == {"weight_version": "step 1"}
    assert answers.versions == ["step 1"]
    assert answers.logged == ["weights_updated"]
    fresh, _ = await start(model=str(steps / "step-1"), kv_cache=cache)
    new = (await worker.embed(EmbedRequest(inputs=[PROMPT]))).data
    assert new == (await fresh.embed(EmbedRequest(inputs=[PROMPT]))).data != old.data
    # And back again, as a file alone.
    await reload(worker, "step-2/model.safetensors", "step 2")
    assert await said(worker, answers, "last") == reference(steps / "step-2", PROMPT, 20)


def continued(before: Path, after: Path, switched: int, count: int) -> list[int]:
    """So many tokens of the one model, and the rest of the other over what the first has cached."""
    tokenizer = byte_tokenizer()
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (before, after)]
    given = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens: list[int] = []
    cache = None
    with torch.inference_mode():
        while len(tokens) < count:
            model = models[len(tokens) >= switched]
            output = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens.append(int(output.logits[0, -1].argmax()))
            given = torch.tensor([[tokens[-1]]])
    return tokens


def switch_asked(worker: ModelWorker) -> asyncio.Event:
    """Set when weights are read, and the engine is asked to change them."""
    assert worker._assembled is not None
    engine, asked = worker._assembled.engine, asyncio.Event()
    switch = engine.switch_weights

    def asking(*arguments: Any) -> Any:
        future = switch(*arguments)
        asked.set()
        return future

    engine.switch_weights = asking  # type: ignore[method-assign, assignment]
    return asked


async def switched(worker: ModelWorker, answers: Answers, mode: str, count: int) -> dict[str, Any]:
    """Load other weights while an answer has five tokens or a few more, and another prompt has just come."""
    worker.begin(greedy("running", count))
    await answers.until("running", tokens=5)
    gate = hold(worker)
    worker.begin(greedy("new", 20))
    await prepared(worker)
    asked = switch_asked(worker)
    loading = asyncio.create_task(reload(worker, "step-1", mode=mode))
    await asked.wait()
    gate.set()
    told: dict[str, Any] = await loading
    await answers.until("running", "new")
    assert not answers.errors
    return told


@pytest.mark.parametrize("cache", ["paged", "padded"])
@pytest.mark.parametrize("mode", ["wait", "keep", "recompute", "abort"])
async def test_a_stream_in_flight_goes_on_as_it_was_asked_for(
    start: Start, steps: Path, tiny_llama: Path, mode: str, cache: str
) -> None:
    worker, answers = await start(kv_cache=cache)
    # Part of the prompt that comes is cached by the old weights.
    await said(worker, answers, "earlier", 2)
    told = await switched(worker, answers, mode, 60)
    assert answers.tokens("new") == reference(steps / "step-1", PROMPT, 20)
    assert spans(answers.last("new")) == [("one", 0, 20)]
    tokens, old = answers.tokens("running"), reference(tiny_llama, PROMPT, 60)
    parts = spans(answers.last("running"))
    if mode == "wait":
        assert told["running"] == 0
        assert tokens == old
        assert parts == [("zero", 0, 60)]
        return
    assert told["running"] == 1
    at = parts[0][2]
    assert 5 <= at < 60
    assert tokens[:at] == old[:at]
    if mode == "abort":
        assert answers.last("running").finish_reason == "abort"
        assert (len(tokens), parts) == (at, [("zero", 0, at)])
        return
    assert parts == [("zero", 0, at), ("one", at, 60)]
    if mode == "keep":
        assert tokens == continued(tiny_llama, steps / "step-1", at, 60)
    else:
        fresh, others = await start(model=str(steps / "step-1"), kv_cache=cache)
        fresh.begin(greedy("resumed", 60, resume_token_ids=tokens[:at]))
        await others.until("resumed")
        assert tokens[at:] == others.tokens("resumed")
    # Rows that went on over what they had have left nothing behind that a prompt could find.
    assert await said(worker, answers, "again") == reference(steps / "step-1", PROMPT, 20)


BEAMS = {"use_beam_search": True, "n": 2, "best_of": 3, "temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
BEST = {"n": 2, "best_of": 3, "seed": 4, "max_new_tokens": 30, "ignore_eos": True}
TOLD = {"prompt_logprobs": 1, "temperature": 0, "max_new_tokens": 3, "ignore_eos": True}


async def after_turns(worker: ModelWorker, answers: Answers, steps: int, sampling: dict[str, Any], mode: str) -> Any:
    """Have a prompt of six parts answered, with other weights after so many turns of the engine."""
    assert worker._assembled is not None
    engine, turns = worker._assembled.engine, iter(range(steps))
    new = weights.Weights(worker._assembled.loaded.model).read(worker._weights_dir.find("step-1"))
    gate = hold(worker)

    def turn() -> None:
        if next(turns, None) is None:
            engine.switch_weights(new.exchange, mode, "one")  # type: ignore[arg-type]
        else:
            engine.run_job(turn)

    worker.begin(ask("asked", PROMPT, **sampling))
    await prepared(worker)
    engine.run_job(turn)
    gate.set()
    await answers.until("asked")
    assert not answers.errors
    deltas = answers.deltas["asked"]
    entries = [entry and (entry.token.token_id, entry.token.logprob) for entry in deltas[0].prompt_logprobs or ()]
    texts = [(answers.tokens("asked", index), answers.text("asked", index)) for index in range(2)]
    return [delta.finish_reason for delta in deltas if delta.finish_reason], texts, entries


@pytest.mark.parametrize("cache", ["paged", "padded"])
@pytest.mark.parametrize(
    ("sampling", "turns", "mode"),
    [(TOLD, 3, "keep"), (BEAMS, 3, "keep"), (BEAMS, 9, "recompute"), (BEAMS, 9, "abort"), (BEST, 9, "abort")],
)
async def test_prompts_in_parts_and_searches_begin_anew_or_end(
    start: Start, steps: Path, sampling: dict[str, Any], turns: int, mode: str, cache: str
) -> None:
    options = {"prefill_chunk_tokens": 8, "kv_cache": cache}
    ended, texts, entries = await after_turns(*await start(**options), turns, sampling, mode)
    if mode == "abort":
        assert ended == ["abort"] * 2
        return
    new = await after_turns(*await start(model=str(steps / "step-1"), **options), 0, sampling, mode)
    assert (ended, texts) == new[:2]
    assert len(entries) == (len(PROMPT) if sampling is TOLD else 0)
    assert entries[1:] == [(token, pytest.approx(logprob, abs=1e-4)) for token, logprob in new[2][1:]]


async def test_vectors_that_are_under_way_begin_anew(start: Start, steps: Path) -> None:
    """A long text whose parts are computed between steps of a stream."""
    worker, answers = await start(prefill_chunk_tokens=8, embed_batch_tokens=8)
    assert worker._assembled is not None
    engine, queue = worker._assembled.engine, worker._assembled.queue
    new = weights.Weights(worker._assembled.loaded.model).read(worker._weights_dir.find("step-1"))
    worker.begin(greedy("stream", 400))
    await answers.until("stream", tokens=1)
    gate = hold(worker)
    embedding = asyncio.create_task(worker.embed(EmbedRequest(inputs=["x" * 200])))
    under_way = []

    def look() -> None:
        under_way.append(queue._pass is not None)
        if not under_way[-1]:
            engine.run_job(look)
            return
        new.exchange()
        queue.restart()

    while not engine._jobs:
        await asyncio.sleep(0)
    engine.run_job(look)
    gate.set()
    vectors = (await embedding).data
    assert under_way[-1]
    fresh, _ = await start(model=str(steps / "step-1"), prefill_chunk_tokens=8, embed_batch_tokens=8)
    expected = (await fresh.embed(EmbedRequest(inputs=["x" * 200]))).data
    np.testing.assert_allclose(np.frombuffer(vectors, "f4"), np.frombuffer(expected, "f4"), atol=1e-5)


async def test_weights_come_in_parts(start: Start, steps: Path, tiny_llama: Path) -> None:
    worker, answers = await start(weights_dir=None)
    data = (steps / "step-1" / "model.safetensors").read_bytes()
    lost = (await operate(worker, "start_weight_update", size=len(data)))["update"]
    begun = await operate(worker, "start_weight_update", size=len(data))
    update, half = begun["update"], len(data) // 2
    for wrong, reason in (
        ({"update": lost, "offset": 0, "data": data}, f"update {lost} is not under way, {update} is"),
        ({"update": update, "offset": 5, "data": data[5:]}, "0 of"),
        ({"update": update, "offset": 0, "data": data + b"x"}, "0 of"),
        ({"update": update, "offset": 0, "data": b""}, "bytes that is not empty"),
    ):
        with pytest.raises(RequestError, match=reason):
            await operate(worker, "update_weights", **wrong)
    assert await operate(worker, "update_weights", update=update, offset=0, data=data[:half]) == {"received": half}
    with pytest.raises(RequestError, match="weights are not whole"):
        await operate(worker, "finish_weight_update", update=update, weight_version="x")
    await operate(worker, "update_weights", update=update, offset=half, data=data[half:])
    assert await said(worker, answers, "before") == reference(tiny_llama, PROMPT, 20)
    await operate(worker, "finish_weight_update", update=update, weight_version="sent")
    assert await said(worker, answers, "after") == reference(steps / "step-1", PROMPT, 20)
    with pytest.raises(RequestError, match=f"update {update} is not under way"):
        await operate(worker, "finish_weight_update", update=update, weight_version="sent")
    with pytest.raises(RequestError, match="weights of this model have 1 …"):
        await operate(worker, "start_weight_update", size=10**12)
    with pytest.raises(UnsupportedOperationError, match="without --weights-dir"):
        await reload(worker, "step-1")
    assert answers.versions == ["sent"]


def changed(steps: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """A set of weights that differs in something."""
    tensors = load_file(steps / "step-1" / "model.safetensors")
    change(tensors)
    (steps / name).mkdir(exist_ok=True)
    save_file(tensors, steps / name / "model.safetensors", metadata={"format": "pt"})
    return name


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda all_: all_.pop("lm_head.weight"), "missing: lm_head.weight$"),
    "unexpected": (lambda all_: all_.update(foo=torch.zeros(2)), "unexpected: foo$"),
    "shape": (
        lambda all_: all_.update({"model.norm.weight": torch.zeros(3)}),
        r"other shapes: model.norm.weight \(3,\) for \(64,\)$",
    ),
    "expert": (
        lambda all_: all_.update({"experts.0.weight": torch.zeros(64, dtype=torch.int8)}),
        r"unexpected: experts.0.weight; other types: experts.0.weight I8$",
    ),
    "type": (
        lambda all_: all_.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
        r"other types: model.norm.weight I8 for torch.float32$",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_weights_that_do_not_fit_change_nothing(start: Start, steps: Path, tiny_llama: Path, wrong: str) -> None:
    change, reason = WRONG[wrong]
    worker, answers = await start()
    with pytest.raises(RequestError, match=reason):
        await reload(worker, changed(steps, wrong, change))
    assert answers.versions == []
    assert await said(worker, answers, "after") == reference(tiny_llama, PROMPT, 20)
    assert spans(answers.last("after")) == [("zero", 0, 20)]


async def test_weights_saved_with_other_settings_and_files_that_are_none_are_refused(start: Start, steps: Path) -> None:
    worker, _ = await start()
    other = steps / "other"
    shutil.copytree(steps / "step-1", other)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"other settings: rms_norm_eps 0\.5 for 1e-06"):
        await reload(worker, "other")
    (other / "model.safetensors").write_bytes(b"no tensors")
    (other / "config.json").unlink()
    with pytest.raises(RequestError, match="the weights cannot be read"):
        await reload(worker, "other")
    with pytest.raises(RequestError, match="mode is 'now', it must be one of wait, keep, recompute, abort"):
        await reload(worker, "step-1", mode="now")
    with pytest.raises(RequestError, match="weight_version is missing"):
        await operate(worker, "reload_weights", path="step-1")


async def test_a_switch_that_fails_in_the_middle_leaves_the_former_weights(
    start: Start, tiny_llama: Path, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = await start()
    exchange, calls = weights._exchange, [0]

    def failing(live: torch.Tensor, other: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == 7:
            raise RuntimeError("the device says no")
        exchange(live, other)

    monkeypatch.setattr(weights, "_exchange", failing)
    with pytest.raises(RuntimeError, match="the device says no"):
        await reload(worker, "step-1")
    assert calls[0] == 7 + 6
    assert await said(worker, answers, "after") == reference(tiny_llama, PROMPT, 20)
    assert (answers.versions, answers.died) == ([], None)
    await reload(worker, "step-1")
    assert await said(worker, answers, "again") == reference(steps / "step-1", PROMPT, 20)


async def test_a_call_that_is_given_up_during_the_switch_is_told_of_all_the_same(start: Start, steps: Path) -> None:
    worker, answers = await start()
    exchange, begun, gate = weights.NewWeights.exchange, threading.Event(), threading.Event()

    def slowly(new: weights.NewWeights) -> None:
        begun.set()
        gate.wait()
        exchange(new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.NewWeights, "exchange", slowly)
        loading = asyncio.create_task(reload(worker, "step-1"))
        await asyncio.to_thread(begun.wait)
        loading.cancel()
        await asyncio.wait([loading])
        gate.set()
        assert await said(worker, answers, "after") == reference(steps / "step-1", PROMPT, 20)
    assert loading.cancelled()
    assert answers.versions == ["one"]


async def test_loads_at_the_same_time_come_one_after_the_other(start: Start, steps: Path, tiny_llama: Path) -> None:
    worker, answers = await start()
    asked = switch_asked(worker)
    worker.begin(greedy("long", 400))
    await answers.until("long", tokens=1)
    gate = hold(worker)
    waiting = asyncio.create_task(reload(worker, "step-2", "never", mode="wait"))
    await asked.wait()
    # One that is given up leaves no trace, and those behind it and what waited for it go on.
    waiting.cancel()
    loads = [reload(worker, f"step-{number}", f"step {number}", mode="keep") for number in (1, 2, 1)]
    worker.begin(greedy("held", 5))
    gate.set()
    await asyncio.gather(*loads)
    await answers.until("held")
    assert answers.versions == ["step 1", "step 2", "step 1"]
    assert await said(worker, answers, "after") == reference(steps / "step-1", PROMPT, 20)
    await answers.until("long")
    assert "never" not in [version for version, _, _ in spans(answers.last("long"))]
    # Steps went on as they were while others were read beside them.
    at = spans(answers.last("long"))[0][2]
    assert answers.tokens("long")[:at] == reference(tiny_llama, PROMPT, 400)[:at]


@pytest.mark.parametrize("tied", [True, False])
async def test_weights_that_are_one_stay_one(start: Start, tmp_path: Path, tied: bool) -> None:
    family = {**FAMILIES["Qwen2Config"], "tie_word_embeddings": True}
    model = save(tmp_path / "model", "Qwen2Config", family)
    other = save_variant(model, tmp_path / "other", 3)
    byte_tokenizer().save_pretrained(other)
    worker, answers = await start(model=str(model), weights_dir=tmp_path)
    if tied:
        await reload(worker, "other")
        assert await said(worker, answers, "after") == reference(other, PROMPT, 20)
        return
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"no longer one: model\.embed_tokens\.weight and lm_head\.weight"):
        await reload(worker, "other")
    assert await said(worker, answers, "after") == reference(model, PROMPT, 20)


@pytest.mark.parametrize("family", ["MixtralConfig", "GPT2Config", "BloomConfig"])
async def test_weights_have_the_names_of_their_files(start: Start, tmp_path: Path, family: str) -> None:
    """Experts lie one by one in files and together in the model; others name their layers without the model's own name."""
    model = save(tmp_path / "model", family, FAMILIES[family])
    other = save_variant(model, tmp_path / "other", 3)
    byte_tokenizer().save_pretrained(other)
    worker, answers = await start(model=str(model), weights_dir=tmp_path)
    await reload(worker, "other")
    assert await said(worker, answers, "after") == reference(other, PROMPT, 20)


async def test_weights_of_another_type_are_rounded_as_at_the_start(start: Start, steps: Path) -> None:
    worker, answers = await start(dtype="bfloat16")
    await reload(worker, "step-1")
    fresh, others = await start(model=str(steps / "step-1"), dtype="bfloat16")
    assert await said(worker, answers, "x") == await said(fresh, others, "x")


async def test_weights_that_are_not_all_that_is_served_are_refused(start: Start, tmp_path: Path) -> None:
    worker, _ = await start()
    assert worker._assembled is not None
    worker._assembled.loaded.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    for call, arguments in (
        ("reload_weights", {"path": "step-1", "weight_version": "x"}),
        ("start_weight_update", {"size": 1_000}),
    ):
        with pytest.raises(UnsupportedOperationError, match="cannot be replaced while it runs: they are quantized"):
            await operate(worker, call, **arguments)
    # Verdicts are computed by a copy of the model's last layer.
    judge, _ = await start(model=str(save_judge(tmp_path, "llama", ["one"])))
    with pytest.raises(UnsupportedOperationError, match="computed by layers outside of it"):
        await operate(judge, "start_weight_update", size=1_000)


async def test_through_a_fabric_answers_tell_their_weights_and_what_was_cached_is_gone(
    tiny_llama: Path, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TransformersOptions(
        model=str(tiny_llama), model_names=("tiny",), dtype="float32", device="cpu", threads=1, kv_cache="paged",
        tell_cache=True, weights_dir=steps,
    )  # fmt: skip
    data = (steps / "step-1" / "model.safetensors").read_bytes()
    asked: dict[str, Any] = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with (
            fabric(f"ipc://{directory}/c.sock", policy="prefix_aware") as made,
            AsyncClient(made.endpoint) as client,
        ):
            await made.add_worker("w0", ModelWorker(options))
            told = Told(monkeypatch, made, client, "tiny", 16)
            prompt = told.prompt(1, 6)
            await told.ask(prompt)
            await told.settle(40)
            assert told.believed(prompt) == 6 * 16
            # Nobody has said what these weights are called.
            assert (await client.generate("tiny", PROMPT, **asked)).extra == {}
            update = (await client.operate("w0", "start_weight_update", size=len(data)))["update"]
            for offset in range(0, len(data), 50_000):
                part = data[offset : offset + 50_000]
                await client.operate("w0", "update_weights", update=update, offset=offset, data=part)
            await client.operate("w0", "finish_weight_update", update=update, weight_version="1")
            await told.settle(41)
            assert told.believed(prompt) == 0
            assert await told.ask(prompt) == 0
            completion = await client.generate("tiny", PROMPT, **asked)
            assert completion.token_ids == reference(steps / "step-1", PROMPT, 20)
            versions = [{"version": "1", "start": 0, "end": 20}]
            assert completion.extra == {"weight_version": "1", "weight_versions": versions}
            assert (await client.model_details("tiny")).details["weight_version"] == "1"


@pytest.mark.gpu
async def test_a_device_takes_other_weights(start: Start, steps: Path) -> None:
    worker, answers = await start(device="cuda")
    worker.begin(greedy("running", 200))
    await answers.until("running", tokens=5)
    await reload(worker, "step-1", mode="recompute")
    fresh, others = await start(model=str(steps / "step-1"), device="cuda")
    assert await said(worker, answers, "x") == await said(fresh, others, "x")
    await answers.until("running")
    assert not answers.errors
