"""Random numbers by a counter: a function of seed and position alone, the same on every device, without a generator's state.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", with the constants of its reference
implementation) as operations on int64 tensors, whose products and sums wrap as those of unsigned numbers do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

_SIGN: Final = 1 << 63
_BITS: Final = 64
#: Any odd number of many bits will do to tell seeds apart.
_SEEDS: Final = 0xD1B54A32D192ED03
_NUMBER_BITS: Final = 52


def seed_state(seed: int) -> int:
    """Where the counter of a seed begins, as a signed number of 64 bits. Any integer is a seed."""
    return _signed(seed * _SEEDS)


def uniform(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1) of 52 bits: times any positive double, each stays below that double.

    Args:
        states: Of `seed_state`, int64.
        positions: From 0, int64; of a shape that goes with that of the states.

    Returns:
        A float64 tensor of their common shape.
    """
    return _mixed(states + (positions + 1) * _GOLDEN).to(torch.float64) * 2.0**-_NUMBER_BITS


def uniform_on_host(states: Sequence[int], positions: Sequence[int], steps: int) -> Any:
    """The same numbers of so many draws from these positions on, as a numpy array (steps, states)."""
    begins = np.array(states, dtype=np.int64) + (np.array(positions, dtype=np.int64) + 1) * _GOLDEN
    return _mixed(begins + _ahead(steps)) * 2.0**-_NUMBER_BITS


@functools.cache
def _ahead(steps: int) -> Any:
    return np.arange(steps, dtype=np.int64)[:, None] * _GOLDEN


def _mixed(state: Any) -> Any:
    """The uppermost bits of a number for each state, of tensors and arrays of int64 alike."""
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return _shifted(state ^ _shifted(state, 31), _BITS - _NUMBER_BITS)


def _shifted(state: Any, bits: int) -> Any:
    """To the right, as an unsigned number is."""
    return (state >> bits) & ((1 << (_BITS - bits)) - 1)


def _signed(number: int) -> int:
    return ((number + _SIGN) & ((1 << _BITS) - 1)) - _SIGN


_GOLDEN: Final = _signed(0x9E3779B97F4A7C15)
_FIRST: Final = _signed(0xBF58476D1CE4E5B9)
_SECOND: Final = _signed(0x94D049BB133111EB)
