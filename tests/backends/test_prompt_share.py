"""How many tokens of prompts go along in a step, by what passes took: times are computed here, and no clock is asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.backends.hf_transformers.scheduling.prompt_share import PromptShare


def settled(share: PromptShare, step_s: float, token_s: float, passes: int = 60) -> float:
    """How much longer a step with prompts takes than one without, after so many."""
    latest = 0
    for _ in range(passes):
        tokens = share.tokens(running=1, waiting=1)
        latest = tokens or latest
        share.passed(rows=1, tokens=tokens, seconds=step_s + token_s * tokens)
    return 1 + token_s * latest / step_s


def test_nobody_running_means_nobody_waits() -> None:
    assert PromptShare(512, 0.1).tokens(running=0, waiting=1) == 2_048


@pytest.mark.parametrize(("running", "waiting", "times"), [(4, 1, 1), (4, 4, 1), (4, 8, 2), (1, 7, 7)])
def test_streams_wait_longer_where_more_requests_wait_for_them(running: int, waiting: int, times: int) -> None:
    share = PromptShare(512, 0.006)
    share.passed(rows=1, tokens=0, seconds=0.010)
    for _ in range(5):
        tokens = share.tokens(running=running, waiting=waiting)
        share.passed(rows=1, tokens=tokens, seconds=0.010 + 0.0001 * tokens)
    # Six milliseconds of such tokens: less than the share of a step, which is seven and a half.
    assert share.tokens(running=running, waiting=waiting) == pytest.approx(60 * times, rel=0.05)


@given(st.floats(0.001, 0.1), st.floats(17, 500))
def test_a_step_with_prompts_takes_little_longer_than_one_without(step_s: float, tokens: float) -> None:
    """Of any device on which so many tokens take the share of a step."""
    share = PromptShare(512, 0.1)
    share.passed(rows=1, tokens=0, seconds=step_s)
    token_s = 0.75 * step_s / tokens
    assert settled(share, step_s, token_s) == pytest.approx(1.75, abs=0.75 / tokens + 0.05)


def test_a_prompt_in_every_pass_leaves_both_parts_known() -> None:
    """More streams run than when the last step without prompts was measured, and none is without them from then on."""
    share = PromptShare(512, 1.0)
    share.passed(rows=1, tokens=0, seconds=0.010)
    settled(share, 0.010, 0.0001)
    assert 1.5 < settled(share, 0.040, 0.0001, 200) < 2.0
    assert 1.5 < settled(share, 0.010, 0.0001, 200) < 2.0


def test_a_step_without_prompts_comes_among_those_with() -> None:
    share = PromptShare(512, 1.0)
    share.passed(rows=1, tokens=0, seconds=0.010)
    found = []
    for _ in range(27):
        found.append(share.tokens(running=1, waiting=1))
        share.passed(rows=1, tokens=found[-1], seconds=0.018 if found[-1] else 0.010)
    assert [place for place, tokens in enumerate(found) if not tokens] == [8, 17, 26]


def test_tokens_that_cost_more_become_fewer_soon() -> None:
    share = PromptShare(512, 1.0)
    share.passed(rows=1, tokens=0, seconds=0.010)
    settled(share, 0.010, 0.00005)
    assert settled(share, 0.010, 0.0002, 30) < 2.0


def test_a_busy_machine_does_not_stop_a_prompt() -> None:
    """Every fifth pass is held up for as long as several take."""
    share = PromptShare(512, 1.0)
    share.passed(rows=1, tokens=0, seconds=0.001)
    for number in range(200):
        tokens = share.tokens(running=1, waiting=1)
        held_s = 0.006 if number % 5 == 4 else 0.0
        share.passed(rows=1, tokens=tokens, seconds=0.001 + 0.00001 * tokens + held_s)
    assert share.tokens(running=1, waiting=1) > 40


def test_few_tokens_that_cost_nothing_do_not_open_the_gates() -> None:
    share = PromptShare(512, 0.1)
    share.passed(rows=1, tokens=0, seconds=0.010)
    share.passed(rows=1, tokens=64, seconds=0.015)
    share.passed(rows=1, tokens=16, seconds=0.010)
    before = share.tokens(running=1, waiting=1)
    share.passed(rows=1, tokens=16, seconds=0.010)
    assert share.tokens(running=1, waiting=1) <= 2 * before


def test_a_pass_that_was_held_up_costs_no_more_than_a_few_tokens() -> None:
    share = PromptShare(512, 1.0)
    share.passed(rows=1, tokens=0, seconds=0.010)
    settled(share, 0.010, 0.0001)
    before = share.tokens(running=1, waiting=1)
    share.passed(rows=1, tokens=before, seconds=3.0)
    assert before / 3 < share.tokens(running=1, waiting=1) < 2 * before


@pytest.mark.parametrize("token_s", [1.0, 1e-9])
def test_a_prompt_goes_on_however_slow_the_device_is_and_keeps_its_bound(token_s: float) -> None:
    share = PromptShare(512, 0.1)
    share.passed(rows=1, tokens=0, seconds=0.010)
    settled(share, 0.010, token_s)
    assert share.tokens(running=1, waiting=1) == (8 if token_s == 1.0 else 512)


def test_nobody_waits_longer_than_wished() -> None:
    share = PromptShare(512, 0.1)
    share.passed(rows=1, tokens=0, seconds=1.0)
    assert settled(share, 1.0, 0.002) == pytest.approx(1.1, abs=0.01)


def test_a_bound_below_the_least_part_holds() -> None:
    assert PromptShare(4, 0.1).tokens(running=1, waiting=1) == 4


def test_a_step_of_more_rows_is_known_to_take_longer_before_there_was_one() -> None:
    """Steps of one and of eight rows, and a pass of prompts alone: who then runs with twenty-two waits no longer than is said."""
    share = PromptShare(512, 0.1)
    for _ in range(10):
        share.passed(rows=8, tokens=0, seconds=0.030 + 8 * 0.0016)
        share.passed(rows=1, tokens=0, seconds=0.0316)
        share.passed(rows=0, tokens=512, seconds=0.030 + 512 * 0.00135)
    tokens = share.tokens(running=22, waiting=10)
    assert tokens == pytest.approx(0.75 * (0.030 + 22 * 0.0016) / 0.00135, rel=0.15)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 512), st.floats(1e-6, 100.0)), max_size=60))
def test_whatever_passes_take_there_is_a_number_of_tokens(passes: list[tuple[int, int, float]]) -> None:
    share = PromptShare(512, 0.1)
    for rows, tokens, seconds in passes:
        share.passed(rows=rows, tokens=tokens, seconds=seconds)
        assert 0 <= share.tokens(running=7, waiting=30) <= 512


def test_tokens_that_cost_more_the_farther_on_they_are_are_not_taken_for_longer_steps() -> None:
    share = PromptShare(512, 1.0)
    for _ in range(300):
        share.passed(rows=4, tokens=0, seconds=0.001)
    times = []
    for _ in range(3):
        done = 0
        while done < 2_000:
            tokens = share.tokens(running=4, waiting=1)
            seconds = 0.001 + tokens * 5e-6 * (1 + done / 400)
            share.passed(rows=4, tokens=tokens, seconds=seconds)
            times.append(seconds)
            done += tokens
    later = sorted(times[len(times) // 3 :])
    assert later[len(later) * 9 // 10] < 0.0021
