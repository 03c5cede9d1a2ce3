"""States that models keep in ways of their own: RecurrentGemma in its modules, xLSTM and MiniMax in their own kinds of caches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.test_engine import Start, causal_model, greedy, starting, together
from tests.backends.test_states import LONG, runner, saved
from tests.backends.tiny import _loaded, ask, reference
from tests.sweep.subject import save
from zfabric.errors import ConfigurationError
from zfabric.wire.tasks import EmbedRequest

#: Whether prompts of different lengths are computed together, and whether in parts. RecurrentGemma's convolution reads padding
#: and does not go on with a part, and xLSTM knows no padding.
KINDS = {"recurrent_gemma": (False, False), "xlstm": (False, True), "minimax": (True, True)}
PROMPTS = ["Hello", LONG, "a", "Once upon"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of tiny random models, by their kinds."""
    return saved(tmp_path_factory, KINDS)


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    async with starting(tmp_path, "auto") as start_one:
        yield start_one


def wanted(directory: Path, prompt: str, count: int) -> list[int]:
    """What `generate` makes of a prompt, with a model that has read nothing before."""
    _loaded.cache_clear()
    return reference(directory, prompt, count)


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_joins_leaves_and_waits_each_text_is_its_own(
    kind: str, tiny: dict[str, Path], start: Start
) -> None:
    worker, answers = await start(model=str(tiny[kind]), max_batch_size=4, prefill_chunk_tokens=16)
    model = runner(worker)
    assert model.states
    assert (model.pads, model.parts) == KINDS[kind]
    core: Any = worker._assembled.engine._core  # type: ignore[union-attr]
    core._kv_tokens_max = 2 * model.cells(85)
    await together(worker, answers, PROMPTS, 28)
    for prompt in PROMPTS:
        text = wanted(tiny[kind], prompt, 28)
        assert answers.tokens(prompt) == text
        assert len(set(text)) > 3
    assert (worker.load_report().gauges["preemptions"] > 0) is model.grows


@pytest.mark.parametrize("kind", KINDS)
async def test_choices_begin_with_one_state_and_vectors_leave_it_as_it_is(
    kind: str, tiny: dict[str, Path], start: Start
) -> None:
    worker, answers = await start(model=str(tiny[kind]))
    worker.begin(ask("seeded", "Hello", n=3, seed=5, max_new_tokens=12, ignore_eos=True))
    worker.begin(ask("one", "Hello", seed=5, max_new_tokens=12, ignore_eos=True))
    worker.begin(greedy("greedy", LONG, 60))
    await answers.until("greedy", tokens=2)
    await worker.embed(EmbedRequest(inputs=["Hello", LONG]))
    assert len(answers.tokens("greedy")) < 60
    await answers.until("seeded", "greedy", "one")
    assert answers.tokens("greedy") == wanted(tiny[kind], LONG, 60)
    assert answers.tokens("seeded", 0) == answers.tokens("one")
    assert len({tuple(answers.tokens("seeded", choice)) for choice in range(3)}) == 3


async def test_rows_that_have_left_leave_nothing_in_modules(tiny: dict[str, Path], start: Start) -> None:
    worker, answers = await start(model=str(tiny["recurrent_gemma"]))
    worker.begin(greedy("a", "Hello", 4))
    await answers.until("a")
    held = [
        name
        for name, module in causal_model(worker).named_modules()
        if getattr(module, "recurrent_states", None) is not None
    ]
    assert not held


async def test_a_model_that_mixes_rows_is_refused_by_name(start: Start, tmp_path: Path) -> None:
    save("rwkv", "causal", tmp_path)
    with pytest.raises(ConfigurationError, match="'rwkv', whose code in transformers mixes the rows"):
        await start(model=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
async def test_states_on_a_device_say_what_generate_says(kind: str, tiny: dict[str, Path], start: Start) -> None:
    worker, answers = await start(model=str(tiny[kind]), device="cuda", prefill_chunk_tokens=16)
    for prompt in PROMPTS:
        worker.begin(greedy(prompt, prompt, 20))
        await answers.until(prompt, tokens=2)
    await answers.until(*PROMPTS)
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == wanted(tiny[kind], prompt, 20)
