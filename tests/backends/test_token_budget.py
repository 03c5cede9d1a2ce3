"""How prompts are cut, so that running streams wait no longer than wished."""

from __future__ import annotations

import pytest

from zfabric.backends.hf_transformers.request.token_budget import TokenBudget


def settled(budget: TokenBudget, fixed_s: float, token_s: float) -> float:
    """The wait for a part, once the budget has found its size, on a device of such speed."""
    for _ in range(50):
        tokens = budget.budget(running=True)
        budget.stepped(fixed_s)
        budget.took(tokens, fixed_s + token_s * tokens)
    return fixed_s + token_s * budget.budget(running=True)


def test_nobody_running_means_nobody_waits() -> None:
    assert TokenBudget(512, 0.1).budget(running=False) == 512


@pytest.mark.parametrize("token_s", [0.0004, 0.001, 0.003])
def test_the_wait_comes_near_to_the_wished_one(token_s: float) -> None:
    assert settled(TokenBudget(4_096, 0.1), 0.01, token_s) == pytest.approx(0.1, rel=0.15)


def test_a_fast_device_takes_whole_parts() -> None:
    budget = TokenBudget(512, 0.1)
    settled(budget, 0.005, 0.00001)
    assert budget.budget(running=True) == 512


def test_slow_steps_stretch_the_wait_rather_than_stop_the_prompt() -> None:
    budget = TokenBudget(512, 0.05)
    assert settled(budget, 0.06, 0.001) == pytest.approx(0.18, rel=0.15)
    assert budget.budget(running=True) > 100


def test_no_part_is_tiny_however_slow_the_device() -> None:
    budget = TokenBudget(512, 0.01)
    settled(budget, 0.0, 10.0)
    assert budget.budget(running=True) == 16


def test_the_end_of_a_prompt_teaches_nothing() -> None:
    budget = TokenBudget(512, 0.1)
    before = budget.budget(running=True)
    budget.took(3, 0.001)
    assert budget.budget(running=True) == before
