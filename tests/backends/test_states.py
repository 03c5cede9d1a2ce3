"""Models whose layers keep a state: each row has its own, whatever joins, leaves, waits or fails beside it.

Four kinds: linear attention beside attention (Qwen3-Next), Mamba beside attention (Jamba), which cannot go on with a prompt,
Mamba alone, and Mamba-2 in the layers of attention (Falcon-H1).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from msgspec import structs
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.backends.test_beams import expected, search
from tests.backends.test_engine import Start, causal_model, failing, greedy, hold, prepared, shape, starting, together
from tests.backends.test_lora import linear_layers, save_adapter
from tests.backends.test_weights import operate
from tests.backends.tiny import ask, byte_tokenizer, reference
from tests.sweep.subject import save
from zfabric.backends.hf_transformers.cache.state_cache import StateLayer
from zfabric.backends.hf_transformers.checks import state_check
from zfabric.backends.hf_transformers.parameters.packing import pack
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, OutOfMemoryError
from zfabric.wire.tasks import EmbedRequest

KINDS = ("qwen3_next", "jamba", "mamba", "falcon_h1")
#: Kinds whose layers, at one place in all of them, can be made to fail.
HYBRID = ("qwen3_next", "jamba")
LONG = "The quick brown fox jumps over the lazy dog, and then it sleeps."


def saved(tmp_path_factory: pytest.TempPathFactory, kinds: Iterable[str]) -> dict[str, Path]:
    """Directories of tiny random models, by their kinds."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in kinds}
    for kind, directory in made.items():
        torch.manual_seed(0)
        save(kind, "causal", directory)
    return made


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of tiny random models, by their kinds."""
    return saved(tmp_path_factory, KINDS)


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    async with starting(tmp_path, "auto") as start_one:
        yield start_one


def runner(worker: ModelWorker) -> ModelRunner:
    core: Any = worker._assembled.engine._core  # type: ignore[union-attr]
    model: ModelRunner = core._model
    return model


def watched(worker: ModelWorker) -> list[tuple[int, int]]:
    """Rows and columns of each pass from now on."""
    passes: list[tuple[int, int]] = []
    model = causal_model(worker)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, arguments: passes.append(shape(arguments[0])))
    return passes


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_joins_leaves_and_waits_each_text_is_its_own(
    kind: str, tiny: dict[str, Path], start: Start
) -> None:
    worker, answers = await start(model=str(tiny[kind]), max_batch_size=4, prefill_chunk_tokens=16)
    model = runner(worker)
    assert (model.states, model.pads) == (True, True)
    assert model.parts is (kind not in ("jamba", "mamba"))
    # Room for two at first, and for one once they have grown.
    core: Any = worker._assembled.engine._core  # type: ignore[union-attr]
    core._kv_tokens_max = 2 * model.cells(85)
    prompts = ["Hello", LONG, "a", "Once upon"]
    await together(worker, answers, prompts, 28)
    for prompt in prompts:
        assert answers.tokens(prompt) == reference(tiny[kind], prompt, 28)
    assert (worker.load_report().gauges["preemptions"] > 0) is model.grows


@pytest.mark.parametrize("kind", KINDS)
async def test_choices_and_beams_begin_with_one_state(kind: str, tiny: dict[str, Path], start: Start) -> None:
    worker, answers = await start(model=str(tiny[kind]))
    worker.begin(ask("seeded", "Hello", n=3, seed=5, max_new_tokens=12, ignore_eos=True))
    worker.begin(greedy("greedy", "Hello", 12, n=2))
    worker.begin(ask("one", "Hello", seed=5, max_new_tokens=12, ignore_eos=True))
    found = await search((worker, answers), "beams", "Hello you", n=2, best_of=3, max_new_tokens=10, ignore_eos=True)
    await answers.until("seeded", "greedy", "one")
    assert found == expected(tiny[kind], "Hello you", 3, 2, max_new_tokens=10, eos_token_id=None)
    assert answers.tokens("greedy", 0) == answers.tokens("greedy", 1) == reference(tiny[kind], "Hello", 12)
    assert answers.tokens("seeded", 0) == answers.tokens("one")
    assert len({tuple(answers.tokens("seeded", choice)) for choice in range(3)}) == 3


async def test_a_prompt_is_read_in_parts_where_the_model_goes_on_from_a_state(
    tiny: dict[str, Path], start: Start
) -> None:
    for kind, parts in (("qwen3_next", [16, 16, 16, 16]), ("jamba", [64])):
        worker, answers = await start(model=str(tiny[kind]), prefill_chunk_tokens=16)
        passes = watched(worker)
        worker.begin(greedy("a", LONG, 2))
        await answers.until("a")
        assert [columns for _, columns in passes] == [*parts, 1]


async def test_prompts_of_other_lengths_have_a_pass_of_their_own_where_padding_would_be_remembered(
    tiny: dict[str, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = state_check._padded

    def marked(*arguments: Any) -> list[state_check.Found]:
        """As if padding were read like any token: the logits alone would not tell."""
        return [one._replace(states=[state * 1.1 for state in one.states]) for one in padded(*arguments)]

    monkeypatch.setattr(state_check, "_padded", marked)
    worker, answers = await start(model=str(tiny["jamba"]))
    prompts = ["Hello", "Hallo", "a", "Hi", "No"]
    passes, gate = watched(worker), hold(worker)
    for prompt in prompts:
        worker.begin(greedy(prompt, prompt, 6))
    await prepared(worker)
    gate.set()
    await answers.until(*prompts)
    assert passes[:3] == [(2, 5), (1, 1), (2, 2)]
    for prompt in prompts:
        assert answers.tokens(prompt) == reference(tiny["jamba"], prompt, 6)


@pytest.mark.parametrize("kind", HYBRID)
async def test_a_step_that_fails_costs_the_youngest_and_no_state_of_others(
    kind: str, tiny: dict[str, Path], start: Start
) -> None:
    worker, answers = await start(model=str(tiny[kind]))
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried")
    failing(worker, memory, lambda rows, columns: (rows, columns) == (3, 1))
    for name, prompt in (("old", "Hello"), ("older", "Once upon")):
        worker.begin(greedy(name, prompt, 40))
        await answers.until(name, tokens=2)
    worker.begin(greedy("young", "Hello you", 30))
    await answers.until("old", "older", "young")
    assert isinstance(answers.errors["young"], OutOfMemoryError)
    assert answers.tokens("old") == reference(tiny[kind], "Hello", 40)
    assert answers.tokens("older") == reference(tiny[kind], "Once upon", 40)


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1"])
async def test_memory_that_runs_out_while_joining_leaves_the_batch_whole(
    kind: str, tiny: dict[str, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = await start(model=str(tiny[kind]))
    make, calls = StateLayer._make, []

    def make_once(layer: StateLayer, made: Any) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        make(layer, made)

    monkeypatch.setattr(StateLayer, "_make", make_once)
    worker.begin(greedy("old", "Hello", 30))
    await answers.until("old", tokens=2)
    worker.begin(greedy("young", "A much longer prompt, so that the batch would become wider", 30))
    await answers.until("old", "young")
    assert isinstance(answers.errors["young"], OutOfMemoryError)
    assert answers.tokens("old") == reference(tiny[kind], "Hello", 30)


async def test_each_row_has_its_adapter(tiny: dict[str, Path], start: Start, tmp_path: Path) -> None:
    base = tiny["qwen3_next"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    layers = [name for name in linear_layers(model) if name.endswith(("in_proj_qkvz", "out_proj", "o_proj"))]
    adapter = save_adapter(tmp_path / "adapter", base, seed=1, layers=layers)
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for layer in layers:
            down, up = (tensors[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
            model.get_submodule(layer).weight += 2 * up @ down
    ids = AutoTokenizer.from_pretrained(base)("Once upon", return_tensors="pt")["input_ids"]
    changed = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=2)[0, 9:]
    worker, answers = await start(model=str(base), lora=(f"other={adapter}",))
    request = ask("other", "Once upon", temperature=0, max_new_tokens=12, ignore_eos=True)
    worker.begin(structs.replace(request, model="other"))
    worker.begin(greedy("own", "Once upon", 12))
    await answers.until("own", "other")
    assert answers.tokens("other") == changed.tolist() != answers.tokens("own")
    assert answers.tokens("own") == reference(base, "Once upon", 12)


async def test_vectors_are_those_of_its_hidden_states(tiny: dict[str, Path], start: Start) -> None:
    worker, _ = await start(model=str(tiny["mamba"]), embed_batch_tokens=32)
    result = await worker.embed(EmbedRequest(inputs=["Hello", LONG]))
    found = np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)
    model = AutoModel.from_pretrained(tiny["mamba"], dtype=torch.float32).eval()
    for row, text in zip(found, ("Hello", LONG), strict=True):
        ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        assert np.allclose(row, (hidden / hidden.norm()).numpy(), atol=1e-5)


async def test_states_count_as_room(tiny: dict[str, Path], start: Start) -> None:
    worker, _ = await start(model=str(tiny["jamba"]), kv_tokens_max=300)
    model = runner(worker)
    assert (model.grows, model.row_cells) == (True, 24)
    assert worker._assembled.loaded.context_length == 300 - 24  # type: ignore[union-attr]
    worker, _ = await start(model=str(tiny["mamba"]), kv_tokens_max=4096)
    model = runner(worker)
    assert (model.grows, model.cells(10_000)) == (False, 1024)
    with pytest.raises(ConfigurationError, match=r"state of one row .* takes as much as 24 tokens"):
        await start(model=str(tiny["jamba"]), kv_tokens_max=20)


async def test_a_model_whose_rows_are_not_their_own_is_refused_by_name(
    tiny: dict[str, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixing(StateLayer):
        """The state of a row goes into that of another."""

        def update_recurrent_state(self, recurrent_states: Any, state_idx: int = 0, **kwargs: Any) -> Any:
            mixed = recurrent_states + recurrent_states.mean(dim=0, keepdim=True) * (recurrent_states.shape[0] > 1)
            return super().update_recurrent_state(mixed, state_idx, **kwargs)

    monkeypatch.setattr("zfabric.backends.hf_transformers.cache.state_cache.StateLayer", Mixing)
    with pytest.raises(ConfigurationError, match="answers otherwise in a batch than alone"):
        await start(model=str(tiny["qwen3_next"]))

    class Shared(StateLayer):
        """One state for all rows."""

        def merge(self, other: Any) -> None:
            return

    monkeypatch.setattr("zfabric.backends.hf_transformers.cache.state_cache.StateLayer", Shared)
    with pytest.raises(ConfigurationError, match="cannot be split into rows"):
        await start(model=str(tiny["qwen3_next"]))


async def test_steps_of_states_are_neither_paged_nor_compiled(tiny: dict[str, Path], start: Start) -> None:
    with pytest.raises(ConfigurationError, match="cannot have a paged cache: its layers keep a state"):
        await start(model=str(tiny["mamba"]), kv_cache="paged")
    with pytest.raises(ConfigurationError, match="compile does not go with layers that keep a state"):
        await start(model=str(tiny["mamba"]), compile=True)


def test_a_weight_that_is_read_past_its_layer_stays_as_it_is() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(512, 512) for name in ("dt_proj", "out_proj")})
    assert pack(model) == 1
    assert type(model["dt_proj"]) is torch.nn.Linear


async def test_a_state_that_is_lost_shows_in_half_precision_too(tiny: dict[str, Path], start: Start) -> None:
    """Its logits are as near as rounding may take them there."""
    for kind, parts in (("jamba", False), ("qwen3_next", True)):
        worker, _ = await start(model=str(tiny[kind]), dtype="bfloat16")
        assert (runner(worker).pads, runner(worker).parts) == (True, parts)


async def test_other_weights_and_an_answer_resumed_go_on_from_a_state_made_anew(
    tiny: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    base, other = tiny["jamba"], tmp_path / "step-1"
    torch.manual_seed(1)
    save("jamba", "causal", other)
    worker, answers = await start(model=str(base), weights_dir=tmp_path, weight_version="zero")
    old = reference(base, "Once upon", 120)
    worker.begin(
        ask("resumed", "Once upon", temperature=0, max_new_tokens=20, resume_token_ids=old[:8], ignore_eos=True)
    )
    await answers.until("resumed")
    assert answers.tokens("resumed") == old[8:20]
    worker.begin(greedy("running", "Once upon", 120))
    await answers.until("running", tokens=5)
    told = await operate(worker, "reload_weights", path="step-1", weight_version="one", mode="recompute")
    worker.begin(greedy("new", "Hello", 8))
    await answers.until("running", "new")
    assert told["running"] == 1
    assert answers.tokens("new") == reference(other, "Hello", 8)
    tokens = answers.tokens("running")
    drawn = next(place for place, (token, its) in enumerate(zip(tokens, old, strict=True)) if token != its)
    assert 5 <= drawn < 120
    # From the first token of the new weights on, all is as if they had read what is before it.
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    ids = torch.tensor([[*byte_tokenizer()("Once upon")["input_ids"], *tokens[:drawn]]])
    goes_on = model.generate(ids, max_new_tokens=120 - drawn, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert tokens[drawn:] == goes_on[0, ids.shape[1] :].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
async def test_states_on_a_device_say_what_generate_says(kind: str, tiny: dict[str, Path], start: Start) -> None:
    worker, answers = await start(model=str(tiny[kind]), device="cuda", prefill_chunk_tokens=16)
    for prompt in ("Hello", LONG, "a"):
        worker.begin(greedy(prompt, prompt, 20))
        await answers.until(prompt, tokens=2)
    await answers.until("Hello", LONG, "a")
    for prompt in ("Hello", LONG, "a"):
        assert answers.tokens(prompt) == reference(tiny[kind], prompt, 20)
