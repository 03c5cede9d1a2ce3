"""A model over two processes: each text is what one process says, and none of them outlives another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backends.test_architectures import FAMILIES, SIZES, save
from tests.backends.test_engine import PROMPTS, greedy
from tests.backends.tiny import Answers, ask, reference, save_llama
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner import tensor_parallel
from zfabric.backends.hf_transformers.runner.tensor_parallel import Ranks, check, check_model
from zfabric.backends.hf_transformers.scheduling import engine
from zfabric.backends.hf_transformers.setup import assembly
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import BackendError, ConfigurationError, UnsupportedOperationError
from zfabric.wire.payloads import OperateRequest
from zfabric.wire.tasks import EmbedRequest


@pytest.fixture(scope="module")
def even_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokens are an even number."""
    directory = save_llama(tmp_path_factory.mktemp("even-llama"))
    config = LlamaConfig.from_pretrained(directory)
    config.vocab_size += config.vocab_size % 2
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def lonely() -> Iterator[subprocess.Popen[bytes]]:
    """A rank that nobody leads, started while others do."""
    command = [sys.executable, "-m", "zfabric.backends.hf_transformers.setup.rank"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def divided(model: Path, **options: Any) -> TransformersOptions:
    chosen = {"model": str(model), "device": "cpu", "dtype": "float32", "threads": 1, "tensor_parallel": 2, **options}
    return TransformersOptions(**chosen)


@pytest_asyncio.fixture
async def served(
    even_llama: Path, lonely: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[ModelWorker, Answers]]:
    """Its steps are begun before the host has read what the ones before drew, as on a CUDA device."""
    monkeypatch.setattr(engine, "_AHEAD", {"cpu"})
    options = divided(even_llama, kv_tokens_max=144, chat_template=even_llama / "chat_template.jinja")
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    await worker.load()
    yield worker, answers
    await worker.close()


def led(worker: ModelWorker) -> Ranks:
    assert worker._assembled is not None
    assert worker._assembled.ranks is not None
    return worker._assembled.ranks


async def test_two_processes_say_what_one_says(served: tuple[ModelWorker, Answers], even_llama: Path) -> None:
    """Rows join, wait for room and share blocks; a choice copies one. When a rank is killed in a pass, the engine ends."""
    worker, answers = served
    (info,) = worker._models()
    assert info.details["tensor_parallel"] == 2
    assert {"generate", "chat"} <= set(info.capabilities)
    assert "embed" not in info.capabilities
    assert "use_beam_search" not in (info.parameters or [])
    names = [f"{number} {prompt}" for number, prompt in enumerate(PROMPTS)]
    for name in names:
        worker.begin(greedy(name, name, 60))
    await answers.until(*names)
    for name in names:
        assert answers.tokens(name) == reference(even_llama, name, 60)
    gauges = worker.load_report().gauges
    assert gauges["preemptions"] > 0
    assert gauges["steps_ahead"] > 0
    worker.begin(ask("n", "Once upon", temperature=1.0, seed=3, n=2, max_new_tokens=12, ignore_eos=True))
    await answers.until("n")
    whole = ModelWorker(divided(even_llama, tensor_parallel=1))
    whole.steps = others = Answers()
    await whole.load()
    whole.begin(ask("n", "Once upon", temperature=1.0, seed=3, n=2, max_new_tokens=12, ignore_eos=True))
    await others.until("n")
    await whole.close()
    for index in range(2):
        assert answers.tokens("n", index) == others.tokens("n", index)
    with pytest.raises(UnsupportedOperationError, match="divided over ranks"):
        await worker.embed(EmbedRequest(inputs=["x"]))
    with pytest.raises(UnsupportedOperationError, match="divided over ranks"):
        await worker.operate(OperateRequest(call="start_weight_update", arguments={"size": 1_000}))
    worker.begin(greedy("last", "Once upon a time", 100))
    await answers.until("last", tokens=3)
    led(worker)._processes[0].kill()
    await asyncio.wait_for(answers.death(), 20)
    assert not answers.ended("last") or "last" in answers.errors
    with pytest.raises(BackendError, match=r"rank 1 of the model ended with -9|a pass of several ranks broke"):
        led(worker).send("copy", 0, 1)


async def test_two_processes_guess_over_narrow_keys_as_one_does_not(even_llama: Path) -> None:
    found = []
    narrow = {"kv_cache_dtype": "int8"}
    for options in (
        narrow | {"tensor_parallel": 1},
        narrow | {"speculation": "ngram", "prompt_lookup_min": 1},
    ):
        worker = ModelWorker(divided(even_llama, **options))
        worker.steps = answers = Answers()
        await worker.load()
        for number in range(3):
            worker.begin(greedy(f"{number}", "abcabcab" * 3 + str(number), 40))
        await answers.until("0", "1", "2")
        found.append([answers.tokens(f"{number}") for number in range(3)])
        gauges = worker.load_report().gauges
        await worker.close()
    assert found[0] == found[1]
    assert 0 < gauges["accepted_draft_tokens"] <= gauges["draft_tokens"]


def test_a_rank_ends_with_the_pipe_of_its_worker(lonely: subprocess.Popen[bytes], even_llama: Path) -> None:
    """However that is closed, and although the rank waits for others, which do not come."""
    assert lonely.stdin is not None
    assert lonely.stdout is not None
    tensor_parallel._write(lonely.stdin, [divided(even_llama), 1, str(even_llama / "store")])
    assert lonely.stdout.readline() == tensor_parallel.READY
    with pytest.raises(subprocess.TimeoutExpired):
        lonely.wait(0.5)
    lonely.stdin.close()
    assert lonely.wait(20) == 0


def test_what_cannot_be_divided_is_named(even_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"quantization": "int8"}, "does not go with quantization"),
        ({"lora": ("a=b",)}, "does not go with lora"),
        ({"speculation": "assistant", "assistant": "x"}, "does not go with assistant"),
        ({"device_map": "auto"}, "does not go with device_map"),
        ({"compile": True}, "does not go with compile"),
        ({"kv_cache": "padded"}, "goes with a paged cache"),
        ({"device": "cuda:1"}, "takes GPUs from the first on"),
        ({"tensor_parallel": 0}, "0 are none"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check(divided(even_llama, **options))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match="tensor_parallel 2 needs as many GPUs, and there are 1"):
        check(divided(even_llama, device="cuda"))
    with pytest.raises(ConfigurationError, match="and not device 'cpu'"):
        check(divided(even_llama))
    config = LlamaConfig.from_pretrained(even_llama)
    with pytest.raises(ConfigurationError, match="cannot be divided by 3: its num_attention_heads are 4"):
        check_model(config, "causal", "x", 3)
    with pytest.raises(ConfigurationError, match="cannot be divided by 4: its num_key_value_heads are 2"):
        check_model(config, "causal", "x", 4)
    with pytest.raises(ConfigurationError, match="'x' is encoder"):
        check_model(config, "encoder", "x", 2)
    config.base_model_tp_plan = None
    with pytest.raises(ConfigurationError, match="transformers has no plan for type 'llama'"):
        check_model(config, "causal", "x", 2)


async def test_a_model_that_is_refused_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Noted:
        def __init__(self, *_: Any) -> None:
            pass

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(assembly, "Ranks", Noted)
    worker = ModelWorker(divided(save(tmp_path, "BloomConfig", {**SIZES, **FAMILIES["BloomConfig"]})))
    worker.steps = Answers()
    with pytest.raises(ConfigurationError, match="transformers has no plan for type 'bloom'"):
        await worker.load()
    assert closed == [True]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
async def test_two_devices_say_what_one_says(even_llama: Path) -> None:
    worker = ModelWorker(divided(even_llama, device="cuda", kv_tokens_max=1_024))
    worker.steps = answers = Answers()
    await worker.load()
    worker.begin(greedy("x", "Once upon a time", 40))
    await answers.until("x")
    await worker.close()
    assert answers.tokens("x") == reference(even_llama, "Once upon a time", 40)
