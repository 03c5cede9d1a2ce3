"""Logits processing against transformers' own processors, and draws that depend on seed and position alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.argmax import argmax
from zfabric.backends.hf_transformers.sampling.logits_processors import process_logits
from zfabric.backends.hf_transformers.sampling.random_numbers import seed_state, uniform
from zfabric.backends.hf_transformers.sampling.sampler import sample
from zfabric.backends.hf_transformers.sampling.sampling_metadata import Warpers
from zfabric.backends.hf_transformers.sampling.warping import keep_typical, pick, pick_bounded, truncate
from zfabric.wire.sampling import SamplingParams

SIZE = 50
SEEDS = st.integers(0, 2**31)


CPU = torch.device("cpu")


def row(
    output: list[int] | None = None,
    prompt: list[int] | None = None,
    seed: int = 1,
    ends: Iterable[int] = (),
    bad_words: Iterable[Iterable[int]] = (),
    **sampling: Any,
) -> Row:
    words = tuple(tuple(word) for word in bad_words)
    return Row(SamplingParams(**sampling), seed, prompt or [], output or [], frozenset(ends), words)


def number(seed: int, position: int) -> float:
    return float(uniform(torch.tensor(seed_state(seed)), torch.tensor(position)))


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn((rows, SIZE), generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None, max_examples=100)
@given(
    SEEDS,
    st.sampled_from([-1, 1, 3, 20, 200]),
    st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from([1.0, 0.9, 0.2]),
)
def test_warpers_keep_what_those_of_transformers_keep(
    seed: int, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    logits = random_logits(seed)
    theirs = LogitsProcessorList()
    if top_k > 0:
        theirs.append(TopKLogitsWarper(min(top_k, SIZE)))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        theirs.append(MinPLogitsWarper(min_p))
    if typical_p < 1:
        theirs.append(TypicalLogitsWarper(mass=typical_p))
    expected = theirs(torch.zeros((1, 1), dtype=torch.long), logits.clone())
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    warpers = Warpers.made([params], CPU)
    kept = keep_typical(truncate(values, logits, warpers), warpers)
    mine = torch.empty_like(logits).scatter_(1, tokens, kept)
    assert torch.equal(mine.isinf(), expected.isinf())
    assert torch.equal(mine[~mine.isinf()], logits[~mine.isinf()])


@settings(deadline=None)
@given(SEEDS, st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20), st.sampled_from([1.1, 1.5, 0.8]))
def test_repetition_penalty_is_that_of_transformers(seed: int, tokens: list[int], penalty: float) -> None:
    logits = random_logits(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())[0]
    mine = logits[0].clone()
    half = len(tokens) // 2
    process_logits(mine.unsqueeze(0), [row(prompt=tokens[:half], output=tokens[half:], repetition_penalty=penalty)])
    torch.testing.assert_close(mine, expected)


@given(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20))
def test_presence_and_frequency_count_the_answer_alone(output: list[int]) -> None:
    scores = torch.zeros(SIZE)
    subject = row(prompt=[3, 4], output=output, presence_penalty=0.5, frequency_penalty=0.25)
    process_logits(scores.unsqueeze(0), [subject])
    for token in range(SIZE):
        count = output.count(token)
        assert scores[token].item() == (-(0.5 + 0.25 * count) if count else 0)


TOKENS = st.integers(0, SIZE - 1)


@settings(deadline=None)
@given(SEEDS, st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=4), st.lists(TOKENS, max_size=6))
def test_bans_are_those_of_transformers(seed: int, words: list[list[int]], output: list[int]) -> None:
    """Theirs looks at the prompt as well, so there is none."""
    logits = random_logits(seed)
    theirs = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([SIZE]))
    expected = theirs(torch.tensor([output], dtype=torch.long), logits.clone())[0]
    mine = logits[0].clone()
    process_logits(mine.unsqueeze(0), [row(output=output, bad_words=words)])
    assert torch.equal(mine, expected)


@settings(deadline=None)
@given(SEEDS, st.dictionaries(TOKENS, st.floats(-10, 10, width=32).filter(bool), min_size=1, max_size=6))
def test_biases_are_those_of_transformers(seed: int, biases: dict[int, float]) -> None:
    logits = random_logits(seed)
    theirs = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()])
    expected = theirs(torch.zeros((1, 1), dtype=torch.long), logits.clone())[0]
    mine = logits[0].clone()
    process_logits(mine.unsqueeze(0), [row(logit_bias=biases)])
    torch.testing.assert_close(mine, expected)


@settings(deadline=None)
@given(SEEDS, st.lists(TOKENS, max_size=8), st.integers(1, 8), st.sets(TOKENS, min_size=1, max_size=3))
def test_the_least_length_is_that_of_transformers(seed: int, output: list[int], least: int, ends: set[int]) -> None:
    logits = random_logits(seed)
    prompt = [1, 2, 3]
    theirs = MinNewTokensLengthLogitsProcessor(len(prompt), least, torch.tensor(sorted(ends)))
    expected = theirs(torch.tensor([prompt + output]), logits.clone())[0]
    mine = logits[0].clone()
    process_logits(mine.unsqueeze(0), [row(prompt=prompt, output=output, ends=ends, min_new_tokens=least)])
    assert torch.equal(mine, expected)


@settings(deadline=None)
@given(SEEDS, st.sampled_from([0.2, 0.7, 1.0, 3.0]), st.sampled_from([-1, 5]), st.sampled_from([1.0, 0.8]))
def test_draws_are_from_the_distribution_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    """A token is drawn where the sum of all before it, in falling order, passes the row's number."""
    logits = random_logits(seed)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    shares = theirs(torch.zeros((1, 1), dtype=torch.long), logits.clone())[0].double().softmax(dim=-1)
    subject = row(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    token = int(sample(logits.clone(), [subject])[0])
    order = shares.sort(descending=True, stable=True).indices if subject.warps else torch.arange(SIZE)
    before = shares[order].cumsum(dim=0)
    place = int((order == token).nonzero())
    assert (before[place - 1] if place else 0) - 1e-5 <= number(seed, 0) <= before[place] + 1e-5


def test_bias_bans_and_least_length() -> None:
    scores = torch.zeros(SIZE)
    words = ((7, 8), (5,), (6, 4))
    subject = row(output=[7], logit_bias={1: 2.5, 2: -1.0}, min_new_tokens=2, ends={9}, bad_words=words)
    process_logits(scores.unsqueeze(0), [subject])
    assert scores[1] == 2.5
    assert scores[2] == -1.0
    assert [token for token in range(SIZE) if scores[token].isinf()] == [5, 8, 9]


LARGE = 3_000


@settings(deadline=None, max_examples=60)
@given(
    SEEDS,
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([-1, 1, 40, 255, 256, 257, 2_900]),
    st.sampled_from([1.0, 0.9, 0.3]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([1.0, 0.5]),
)
def test_few_candidates_draw_what_the_whole_vocabulary_draws(
    seed: int, spread: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    """Logits in steps of an eighth, as of a model in bfloat16: many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn((3, LARGE), generator=generator) * spread * 8).round() / 8
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    numbers = torch.rand(3, generator=generator, dtype=torch.float64)
    warpers = Warpers.made([params] * 3, CPU)
    expected = pick(logits, warpers, numbers, LARGE).tolist()
    assert pick(logits, warpers, numbers, 256).tolist() == expected
    assert (warpers.most is None) == (top_k < 0)
    if warpers.most is not None:
        assert pick_bounded(logits, warpers, numbers, warpers.most).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.lists(st.integers(1, 40), min_size=3, max_size=3), st.sampled_from([1.0, 0.6]), st.integers(1, 60))
def test_bounded_candidates_draw_what_the_whole_vocabulary_draws(
    seed: int, bounds: list[int], top_p: float, left: int
) -> None:
    """Each row with another bound, few values in all, zeros of both signs among them, and all but some tokens banned."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (3, SIZE), generator=generator) * 0.5
    logits = torch.where(torch.rand((3, SIZE), generator=generator) < 0.5, logits, -logits)
    logits[:, torch.randperm(SIZE, generator=generator)[left:]] = float("-inf")
    params = [SamplingParams(top_k=bound, top_p=top_p, min_p=0.05 * place) for place, bound in enumerate(bounds)]
    numbers = torch.rand(3, generator=generator, dtype=torch.float64)
    warpers = Warpers.made(params, CPU)
    assert warpers.most == max(bounds)
    assert pick_bounded(logits, warpers, numbers, max(bounds)).tolist() == pick(logits, warpers, numbers, SIZE).tolist()


@settings(deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_a_draw_does_not_depend_on_batch_mates(seed: int, mates: int) -> None:
    logits = random_logits(seed, rows=mates + 1)
    subject = row(seed=seed, output=[1, 2, 3], temperature=0.8, top_p=0.9)
    others = [row(seed=n, temperature=1.5, top_k=5) if n % 2 else row(temperature=0) for n in range(mates)]
    alone = sample(logits[:1].clone(), [subject])
    together = sample(logits.clone(), [subject, *others])
    assert alone[0] == together[0]


@settings(deadline=None)
@given(SEEDS, st.integers(1, 5), st.sampled_from([{}, {"top_p": 0.7}, {"temperature": 0}, {"min_new_tokens": 4}]))
def test_draws_ahead_are_those_that_come_one_by_one(seed: int, count: int, sampling: dict[str, Any]) -> None:
    logits = random_logits(seed, rows=count)
    ends = range(0, SIZE, 2)
    subject = row(seed=seed, output=[1, 2], ends=ends, **sampling)
    assert subject.independent
    together = sample(logits.clone(), [subject] * count, range(count)).tolist()
    for place in range(count):
        alone = row(seed=seed, output=[1, 2, *together[:place]], ends=ends, **sampling)
        assert sample(logits[place : place + 1].clone(), [alone]).tolist() == together[place : place + 1]


@pytest.mark.parametrize(
    "sampling", [{"repetition_penalty": 1.1}, {"presence_penalty": -1.0}, {"frequency_penalty": 0.5}]
)
def test_rows_whose_draws_depend_on_their_history_say_so(sampling: dict[str, Any]) -> None:
    assert row(logit_bias={1: 2.0}, min_new_tokens=3).independent
    assert not row(**sampling).independent
    assert row(bad_words=[[3]]).independent
    assert not row(bad_words=[[3, 4]]).independent


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = probabilities.log().unsqueeze(0).repeat(4_000, 1)
    rows = [row(seed=seed) for seed in range(4_000)]
    frequency = torch.bincount(sample(logits, rows), minlength=4) / 4_000
    torch.testing.assert_close(frequency, probabilities, atol=0.03, rtol=0)


def splitmix(seed: int, position: int) -> float:
    """By its definition, in numbers without bounds."""
    state = seed * 0xD1B54A32D192ED03 + (position + 1) * 0x9E3779B97F4A7C15
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state %= 2**64
        state = (state ^ (state >> shift)) * factor
    state %= 2**64
    return ((state ^ (state >> 31)) >> 12) / 2**52


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31))
def test_numbers_are_those_of_the_generators_definition(seed: int, position: int) -> None:
    assert number(seed, position) == splitmix(seed, position)


def test_uniform_numbers_differ_by_seed_and_position() -> None:
    states = torch.tensor([seed_state(seed) for seed in range(50)]).unsqueeze(1)
    numbers = set(uniform(states, torch.arange(50)).flatten().tolist())
    assert len(numbers) == 2_500
    assert all(0 <= number < 1 for number in numbers)


def test_greedy_takes_the_likeliest() -> None:
    logits = random_logits(5, rows=3)
    assert sample(logits, [row(temperature=0)] * 3).tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.gpu
def test_draws_on_the_device_are_those_of_the_cpu() -> None:
    logits = random_logits(1, rows=8)
    rows = [row(seed=seed, top_p=0.9, top_k=10) for seed in range(8)]
    assert sample(logits.clone().cuda(), rows).cpu().tolist() == sample(logits, rows).tolist()


@settings(max_examples=50)
@given(
    seed=SEEDS,
    rows=st.integers(1, 4),
    size=st.sampled_from([50, 128, 640, 1_024]),
    values=st.sampled_from([2, 1_000_000]),
    missing=st.booleans(),
)
def test_the_largest_number_is_the_first_of_those_alike(
    seed: int, rows: int, size: int, values: int, missing: bool
) -> None:
    """In one stage as in two; and one that is no number is found, for who refuses it."""
    torch.manual_seed(seed)
    scores = torch.randint(values, (rows, size)).float()
    scores[:, torch.randint(size, (size // 3,))] = float("-inf")
    if missing:
        scores[0, torch.randint(size, (2,))] = float("nan")
    assert torch.equal(argmax(scores), scores.argmax(dim=-1))
    assert argmax(torch.full((rows, size), float("-inf"))).tolist() == [0] * rows
