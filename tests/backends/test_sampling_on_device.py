"""A batch draws what each of its rows draws alone, by parameters that stay on the device; the host waits for one copy a step."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.request.sequence import Sequence
from zfabric.backends.hf_transformers.request.structured_outputs import Guide, StructuredOutputs
from zfabric.backends.hf_transformers.sampling import guide_masks
from zfabric.backends.hf_transformers.sampling.guide_masks import GuideMasks
from zfabric.backends.hf_transformers.sampling.logits_processors import NOTHING, process_logits
from zfabric.backends.hf_transformers.sampling.penalties import Penalties
from zfabric.backends.hf_transformers.sampling.sampler import Draws, Sampler, draw
from zfabric.backends.hf_transformers.sampling.sampling_metadata import SamplingMetadata, Warpers
from zfabric.backends.hf_transformers.sampling.token_histories import TokenHistories
from zfabric.backends.hf_transformers.sampling.warping import pick, pick_bounded
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

SIZE = 96
CPU = torch.device("cpu")
GREEDY: dict[str, Any] = {"temperature": 0.0}
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
#: Parameters of rows that share a batch.
MIX: list[dict[str, Any]] = [
    GREEDY,
    {},
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.8, "temperature": 1.4},
    {"top_k": 20, "top_p": 0.6, "min_p": 0.02},
    {"typical_p": 0.7},
    {"typical_p": 0.5, "top_k": 30, **PENALTIES},
    PENALTIES,
    GREEDY | {"repetition_penalty": 1.5},
    GREEDY | {"frequency_penalty": 1.0},
    {"presence_penalty": -1.0, "logit_bias": {3: 4.0, 5: float("-inf")}},
    {"min_new_tokens": 4, "logit_bias": {1: 30.0, 7: 1.0}},
    GREEDY | {"logit_bias": {9: 25.0}},
    {"bad_words": ("x",), "top_p": 0.9},
    {"allowed": (2, 4, 8, 16)},
    GREEDY | {"allowed": (5, 6), "repetition_penalty": 2.0},
    {"suppressed": True, "temperature": 0.3},
]


def row(number: int, seed: int, prompt: list[int] | None = None, output: list[int] | None = None) -> Row:
    """A row of the mix."""
    chosen = dict(MIX[number % len(MIX)])
    allowed, suppressed = chosen.pop("allowed", ()), chosen.pop("suppressed", False)
    words = ((3,), (4, 5), (2, 2)) if chosen.get("bad_words") else ()
    never = (frozenset({11, 12}), frozenset({13, 14})) if suppressed else (frozenset[int](), frozenset[int]())
    given = (seed, [seed % SIZE, 4, 4, 17] if prompt is None else prompt, [] if output is None else output)
    return Row(SamplingParams(**chosen), *given, frozenset({1, 2}), words, None, never, allowed)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def sequences_of(rows: list[Row]) -> list[Sequence]:
    return cast("list[Sequence]", [SimpleNamespace(row=one) for one in rows])


def logits_of(seed: int, rows: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn((rows, size), generator=torch.Generator().manual_seed(seed)) * 3


def alone(one: Row, logits: torch.Tensor, number: int) -> int:
    """What a row draws that nothing is known of yet, without company."""
    fresh = row(number, one.seed, one.prompt, list(one.output))
    return int(draw(logits.unsqueeze(0).clone(), Draws().metadata([fresh], logits.unsqueeze(0))))


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_that_rows_join_and_leave_draws_what_each_draws_alone(seed: int) -> None:
    """Steps that are computed and thrown away among them, as when a pass fails after the draw."""
    chance = random.Random(seed)
    draws = Draws()
    batch: list[tuple[int, Row]] = []
    for step in range(40):
        if len(batch) < 12 and (not batch or chance.random() < 0.3):
            batch += [(number, row(number, chance.randrange(2**40))) for number in chance.choices(range(len(MIX)), k=3)]
        elif chance.random() < 0.3:
            batch.pop(chance.randrange(len(batch)))
        if not batch:
            continue
        logits = logits_of(1_000 * seed + step, len(batch))
        rows = [one for _, one in batch]
        drawn = draw(logits.clone(), draws.metadata(rows, logits)).tolist()
        assert drawn == [alone(one, logits[place], number) for place, (number, one) in enumerate(batch)]
        if chance.random() < 0.9:
            for one, token in zip(rows, drawn, strict=True):
                one.output.append(token)


EVENTS = st.one_of(
    st.tuples(st.just("join"), st.integers(0, len(MIX) - 1), st.integers(0, 3)),
    st.tuples(st.sampled_from(["leave", "wait", "return", "swap", "lose"]), st.integers(0, 11), st.just(0)),
)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.lists(EVENTS, max_size=4), st.integers(1, 20)), min_size=2, max_size=8), st.integers(0, 2**40)
)
def test_a_batch_that_changes_is_as_one_that_is_made_anew(
    turns: list[tuple[list[tuple[str, int, int]], int]], seed: int
) -> None:
    """Rows join with tokens or without, leave, wait and return, change places, or lose a step."""
    draws = Draws()
    batch: list[tuple[int, Row]] = []
    waiting: list[tuple[int, Row]] = []
    # Numbers are computed for 16 steps at once, so what changes is followed by steps in which nothing does.
    for step, events in enumerate(its for changes, more in turns for its in (changes, *[[]] * (more - 1))):
        lost = False
        for count, (event, number, length) in enumerate(events):
            if event == "join" and len(batch) < 12:
                prompt: list[int] | None = [] if number % 3 == 0 and length == 0 else None
                joins = row(number, seed + 97 * step + count, prompt, [5] * length)
                batch.append((number, joins))
            elif event == "return" and waiting:
                batch.append(waiting.pop(number % len(waiting)))
            elif event in ("leave", "wait") and batch:
                goes = batch.pop(number % len(batch))
                waiting += [goes] if event == "wait" else []
            elif event == "swap" and batch:
                batch.insert(0, batch.pop(number % len(batch)))
            lost = lost or event == "lose"
        if not batch:
            continue
        rows = [one for _, one in batch]
        anew = [row(number, one.seed, one.prompt, list(one.output)) for number, one in batch]
        logits = logits_of(seed % 1_000 + step, len(rows))
        mine, other = draws.metadata(rows, logits), Draws().metadata(anew, logits)
        assert_same(mine, other)
        ours, theirs = logits.clone(), logits.clone()
        drawn = draw(ours, mine).tolist()
        assert drawn == draw(theirs, other).tolist()
        assert torch.equal(ours, theirs)
        if not lost:
            for one, token in zip(rows, drawn, strict=True):
                one.output.append(token)


def assert_same(mine: SamplingMetadata, other: SamplingMetadata) -> None:
    """All that draws come of, bit by bit."""
    assert (mine.greedy, mine.told_places) == (other.greedy, other.told_places)
    names = ["drawn", "temperature", "warped", "unwarped", *(["numbers"] if not mine.greedy else [])]
    pairs = [(getattr(mine, name), getattr(other, name)) for name in names]
    if mine.warpers is not None and other.warpers is not None:
        names = ["top_k", "limited", "top_p", "min_p", "typical", "typical_p"]
        pairs += [(getattr(mine.warpers, name), getattr(other.warpers, name)) for name in names]
    else:
        assert mine.warpers is other.warpers is None
    for one, another in pairs:
        assert (one is None) == (another is None)
        assert one is None or torch.equal(one, another)


def test_draws_go_on_before_the_host_knows_the_last_ones() -> None:
    """One step late: penalties count what was drawn on the device."""
    numbers = [number for number in range(len(MIX)) if "bad_words" not in MIX[number]]
    timely, late = ([row(number, 77 + number) for number in numbers] for _ in range(2))
    draws, late_draws = Draws(), Draws()
    owed: torch.Tensor | None = None
    for step in range(40):
        logits = logits_of(step, len(numbers))
        drawn = draw(logits.clone(), draws.metadata(timely, logits))
        ahead = [0 if owed is None else 1] * len(numbers)
        found = draw(logits.clone(), late_draws.metadata(late, logits, ahead))
        expected = [
            alone(one, logits[place], number) for place, (number, one) in enumerate(zip(numbers, timely, strict=True))
        ]
        assert found.tolist() == drawn.tolist() == expected
        for place, token in enumerate(drawn.tolist()):
            timely[place].output.append(token)
            if owed is not None:
                late[place].output.append(int(owed[place]))
        owed = found


def test_a_prompt_without_tokens_and_tokens_beyond_the_vocabulary() -> None:
    for prompt in ([], [SIZE + 3, 5, SIZE]):
        draws, one = Draws(), row(MIX.index(PENALTIES), 5, prompt)
        for step in range(40):
            logits = logits_of(step, 1)
            (token,) = draw(logits.clone(), draws.metadata([one], logits)).tolist()
            assert token == alone(one, logits[0], MIX.index(PENALTIES))
            one.output.append(token)


def test_places_of_histories_are_used_again() -> None:
    draws = Draws()
    for step in range(100):
        rows = [row(MIX.index(PENALTIES), seed) for seed in range(6)]
        logits = logits_of(step, len(rows))
        draw(logits, draws.metadata(rows, logits))
    assert draws._histories is not None
    assert draws._histories.tokens.shape[0] <= 24


def test_no_token_left_is_told_of_its_row_alone(tokenizer: Any) -> None:
    """The next pass can be given what was drawn all the same."""
    rows = [row(0, 1), row(15, 2), row(2, 3)]
    assert rows[1].allowed == (2, 4, 8, 16)
    logits = logits_of(1, 3)
    logits[1, [2, 4, 8, 16]] = float("-inf")
    pending = Sampler(tokenizer).sample_async(sequences_of(rows), logits)
    tokens = [token for token, _ in pending.result()]
    assert tokens[1] == NOTHING
    assert pending.tokens.tolist() == [tokens[0], 0, tokens[2]]
    assert min(pending.tokens.tolist()) >= 0


@pytest.mark.parametrize(("owner", "name"), [(TokenHistories, "_count"), (Penalties, "_write")])
@pytest.mark.parametrize("before", [True, False])
def test_a_step_that_fails_half_way_counts_nothing(
    owner: type, name: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest token is drawn unless it came often, so that each count shows."""
    work = getattr(owner, name)

    def failing(*given: Any) -> None:
        if not before:
            work(*given)
        raise RuntimeError("out of memory")

    number = MIX.index(GREEDY | {"frequency_penalty": 1.0})
    draws, rows = Draws(), [row(number, seed, output=[5] * seed) for seed in range(6)]
    for step in range(12):
        if step % 3 == 1:
            rows.append(row(number, step, output=[5] * step))
        logits = logits_of(step, 1).repeat(len(rows), 1)
        logits[:, 5] = logits.amax() + 5.5
        if step % 3 == 1:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                with pytest.raises(RuntimeError):
                    step_of(draws, rows, logits.clone())
        drawn = step_of(draws, rows, logits.clone()).tolist()
        assert drawn == [alone(one, logits[place], number) for place, one in enumerate(rows)]
        for one, token in zip(rows, drawn, strict=True):
            one.output.append(token)


def step_of(draws: Draws, rows: list[Row], logits: torch.Tensor) -> torch.Tensor:
    return draw(logits, draws.metadata(rows, logits))


# ── distributions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.6},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    ],
)
def test_draws_have_the_distribution_that_transformers_gives(sampling: dict[str, float]) -> None:
    """Pearson's chi-squared over seeds and over positions, against its mean and six deviations; what is cut off never comes."""
    logits = logits_of(3, 1, 24)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.get("temperature", 1.0)))])
    for name, warper in (
        ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper), ("typical_p", TypicalLogitsWarper),
    ):  # fmt: skip
        if name in sampling:
            theirs.append(warper(sampling[name]))
    exact = (
        theirs(cast("Any", torch.zeros((1, 1), dtype=torch.long)), cast("Any", logits.clone()))[0].double().softmax(-1)
    )
    count = 6_000
    params = SamplingParams(**cast("Any", sampling))
    for rows, ahead in (
        ([Row(params, seed, [], []) for seed in range(count)], None),
        ([Row(params, 12, [], [])] * count, range(count)),
    ):
        drawn = draw(logits.expand(count, -1), Draws().metadata(rows, logits, ahead))
        found = torch.bincount(drawn, minlength=24).double()
        assert not found[exact == 0].any()
        # Tokens of less than five expected draws count as one.
        rare = exact * count < 5
        expected = torch.cat([exact[~rare], exact[rare].sum().view(1)]) * count
        seen = torch.cat([found[~rare], found[rare].sum().view(1)])
        chi = ((seen - expected) ** 2 / expected.clamp(min=1)).sum()
        freedom = len(expected) - 1
        assert chi < freedom + 6 * (2 * freedom) ** 0.5 + 6


# ── what the host does ──────────────────────────────────────────────────────────────────────────────────────────────────

#: What makes the host wait for the device, by function; and operators that do so within.
READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__len__", "__contains__"}
READING_OPERATORS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount",
}  # fmt: skip
#: What brings numbers of the host to the device.
SENDS = {"tensor", "as_tensor", "from_numpy"}


class Traffic(TorchFunctionMode):
    """Counts what the host reads and sends."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in READS | SENDS:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators that wait, and numbers of the host that are made into tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            one is not None and one.dtype is torch.bool for given in args if isinstance(given, list) for one in given
        )
        if name in READING_OPERATORS or name == "lift_fresh" or masked:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def traffic(sampler: Sampler, rows: list[Row], logits: torch.Tensor) -> Counter[str]:
    """Of one step, in which all rows gain a token."""
    with Traffic() as seen, Operators() as within:
        pending = sampler.sample_async(sequences_of(rows), logits)
        drawn = pending.result()
    for one, (token, _) in zip(rows, drawn, strict=True):
        one.output.append(token)
        if one.guide is not None:
            one.guide.take(token)
    return seen.seen + within.seen


@pytest.mark.parametrize("told", [False, True])
def test_a_step_of_rows_that_stay_sends_nothing_and_waits_for_one_copy(tokenizer: Any, told: bool) -> None:
    """All that a request can bring, but words of several tokens, which are looked for on the host."""
    rows = [row(number, number) for number in range(len(MIX)) if "bad_words" not in MIX[number]]
    rows += [row(0, 9), row(1, 8)]
    if told:
        rows[2].alternatives, rows[9].alternatives = 3, 0
    sampler = Sampler(tokenizer)
    first = traffic(sampler, rows, logits_of(0, len(rows)))
    assert first["tensor"]
    # Numbers are computed for some steps at once, and more than once in so many.
    for step in range(1, 40):
        found = traffic(sampler, rows, logits_of(step, len(rows)))
        if step not in (1, 4):
            # After these, tokens that may not begin an answer may come, and tokens that end one.
            assert found == {"tolist": 1}, step


def test_a_bounded_pick_waits_for_nothing() -> None:
    params = [SamplingParams(top_k=bound, top_p=0.9, min_p=0.01, typical_p=0.9) for bound in (5, 20)]
    warpers, logits, numbers = Warpers.made(params, CPU), logits_of(0, 2), torch.rand(2, dtype=torch.float64)
    with Traffic() as seen, Operators() as within:
        drawn = pick_bounded(logits, warpers, numbers, 20)
    assert not seen.seen + within.seen
    assert drawn.tolist() == pick(logits, warpers, numbers, SIZE).tolist()


def test_guides_cost_one_copy_more(tokenizer: Any) -> None:
    outputs = StructuredOutputs(tokenizer, vocabulary_size=len(tokenizer), end_tokens=frozenset({1}))
    guides = [made(outputs, f"[ab]{{{number},40}}") for number in (1, 20, 30)]
    rows = [Row(SamplingParams(), seed, [3], [], guide=guide) for seed, guide in enumerate(guides)]
    rows += [Row(SamplingParams(temperature=0), 3, [3], [])]
    sampler = Sampler(tokenizer)
    for step in range(10):
        found = traffic(sampler, rows, logits_of(step, len(rows), len(tokenizer)))
        assert not step or found == {"tolist": 1}


# ── guides ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def made(outputs: StructuredOutputs, expression: str) -> Guide:
    request = GenerateRequest(prompt="", request_id="", sampling=SamplingParams(guided_regex=expression))
    guide = outputs.make(request)
    assert guide is not None
    return guide


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("free", [0, 3])
def test_guides_of_a_batch_allow_what_each_allows(
    tokenizer: Any, threads: bool, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them waits, and one has given up: it says so, and none of the others does."""
    llguidance = pytest.importorskip("llguidance")
    executor = llguidance.LLExecutor(2) if threads else None
    monkeypatch.setattr(guide_masks, "_threads", lambda: executor)
    size = len(tokenizer)
    outputs = StructuredOutputs(tokenizer, vocabulary_size=size, end_tokens=frozenset({1}))
    guides = [made(outputs, f"[{letters}]{{3}}x*") for letters in ("ab", "a-z", "^a", "0-9", ".", "é", "q", "A-Z", "w")]
    guides[3].waits = True
    (wrong,) = tokenizer.encode("a", add_special_tokens=False)
    guides[6].matcher.consume_token(wrong)
    allowed = [guide.matcher.compute_logit_bias()[:size] for guide in guides]
    wanted = torch.tensor([[1.0 if one else float("-inf") for one in its] for its in allowed])
    wanted[3] = 1.0
    places = range(free, free + len(guides))
    scores = torch.ones(free + len(guides), size)
    GuideMasks(guides, places, len(scores), CPU).apply(scores)
    assert torch.equal(scores[free:], wanted)
    assert (scores[:free] == 1).all()
    assert [guide.failure is not None for guide in guides] == [index == 6 for index in range(len(guides))]


def test_logits_of_several_rows_are_processed_as_each_alone() -> None:
    rows = [row(number, number, output=[3, number, 3]) for number in range(len(MIX))]
    logits = logits_of(4, len(rows))
    together = logits.clone()
    process_logits(together, rows)
    for place, one in enumerate(rows):
        its = logits[place : place + 1].clone()
        process_logits(its, [one])
        assert torch.equal(its[0], together[place])


# ── a device ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
def test_a_device_draws_what_the_cpu_draws_and_does_not_wait(tokenizer: Any) -> None:
    rows, others = ([row(number, number) for number in range(len(MIX))] for _ in range(2))
    rows[4].alternatives = others[4].alternatives = 2
    cpu, device = Sampler(tokenizer), Sampler(tokenizer)
    for step in range(30):
        logits = logits_of(step, len(rows))
        on_device = logits.cuda()
        expected = cpu.sample(sequences_of(rows), logits)
        torch.cuda.set_sync_debug_mode("error" if step > 5 else "default")
        pending = device.sample_async(sequences_of(others), on_device)
        torch.cuda.set_sync_debug_mode("default")
        found = pending.result()
        assert [token for token, _ in found] == [token for token, _ in expected]
        assert pending.tokens.tolist() == [token for token, _ in found]
        for mine, its, (token, _) in zip(rows, others, found, strict=True):
            mine.output.append(token)
            its.output.append(token)
