"""What a decoder layer does beside its products and its attention, each in one pass over its numbers.

Each value is rounded where transformers' own code rounds it, so that it is the same but for the order in which squares are summed
and the last place of an exponential.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from zfabric.backends.hf_transformers.cpu_kernels.available import LANES
from zfabric.backends.hf_transformers.cpu_kernels.compiling import compiled, inlined
from zfabric.backends.hf_transformers.cpu_kernels.vectors import (
    add,
    bytes_of,
    divide,
    exponential,
    load,
    multiply,
    multiply_add,
    read_whole,
    rounded,
    splat,
    store,
    subtract,
    total,
)

_WHOLE_BYTES: Final = 8
_NOTHING: Final = np.float32(0)
_ONE: Final = np.float32(1)


@compiled
def add_and_norm(
    states: Any, added: Any, weight: Any, output: Any, rows: Any, size: Any, epsilon: Any, kind: Any
) -> None:
    """Add to states, in place, and norm them by the root of their mean square: https://arxiv.org/abs/1910.07467.

    Args:
        states, added, output: Addresses of (rows, size) each; nothing is added if `added` is 0.
        weight: Of (size,).
        size: A multiple of LANES.
        epsilon: Float32, added to the mean.
    """
    for row in range(rows):
        begin = row * size * bytes_of(kind)
        if added:
            for at in range(begin, begin + size * bytes_of(kind), LANES * bytes_of(kind)):
                store(states + at, add(load(states + at, kind), load(added + at, kind)), kind)
        _norm(states + begin, weight, output + begin, size, epsilon, kind)


@compiled
def turn_and_write(
    heads: Any, cosines: Any, sines: Any, slots: Any, keys: Any, values: Any, query_norm: Any, key_norm: Any,
    count: Any, query_heads: Any, key_heads: Any, size: Any, epsilon: Any, kind: Any,
) -> None:  # fmt: skip
    """Turn queries and keys by their tokens' positions, and write keys and values to their places in the pool.

    Args:
        heads: Address of (count, query heads + twice key heads, size): queries, keys, values; those that are turned are so in
            place.
        cosines, sines: Of (count, size): https://arxiv.org/abs/2104.09864.
        slots: Of (count,) int64: places in the pool.
        keys, values: Of (places, key heads, size).
        query_norm, key_norm: Of weights, (size,), by which each head is normed before; 0 for none.
        size: A multiple of twice LANES.
    """
    item = bytes_of(kind)
    step = size * item
    for token in range(count):
        head = heads + token * (query_heads + 2 * key_heads) * step
        slot = read_whole(slots + token * _WHOLE_BYTES) * key_heads * step
        for index in range(query_heads + key_heads):
            norm = query_norm if index < query_heads else key_norm
            if norm:
                _norm(head, norm, head, size, epsilon, kind)
            _turn(head, cosines + token * step, sines + token * step, size, kind)
            if index >= query_heads:
                _copy(head, keys + slot + (index - query_heads) * step, size, kind)
            head += step
        _copy(head, values + slot, key_heads * size, kind)


@compiled
def gate(given: Any, output: Any, rows: Any, size: Any, kind: Any) -> None:
    """SiLU of the first half of each row, times the second.

    Args:
        given: Address of (rows, 2, size).
        output: Of (rows, size).
        size: A multiple of LANES.
    """
    step, one = size * bytes_of(kind), splat(_ONE)
    for row in range(rows):
        begin = given + row * 2 * step
        for at in range(0, step, LANES * bytes_of(kind)):
            its = load(begin + at, kind)
            power = exponential(subtract(splat(_NOTHING), its))
            its = rounded(divide(its, add(power, one)), kind)
            store(output + row * step + at, multiply(its, load(begin + step + at, kind)), kind)


@inlined
def _norm(states: Any, weight: Any, output: Any, size: Any, epsilon: Any, kind: Any) -> None:
    squares = splat(_NOTHING)
    for at in range(0, size * bytes_of(kind), LANES * bytes_of(kind)):
        its = load(states + at, kind)
        squares = multiply_add(its, its, squares)
    factor = splat(_ONE / np.sqrt(total(squares) / np.float32(size) + epsilon))
    for at in range(0, size * bytes_of(kind), LANES * bytes_of(kind)):
        its = rounded(multiply(load(states + at, kind), factor), kind)
        store(output + at, multiply(its, load(weight + at, kind)), kind)


@inlined
def _turn(head: Any, cosines: Any, sines: Any, size: Any, kind: Any) -> None:
    half = size // 2 * bytes_of(kind)
    for at in range(0, half, LANES * bytes_of(kind)):
        first, second = load(head + at, kind), load(head + half + at, kind)
        cosine, sine = load(cosines + at, kind), load(sines + at, kind)
        turned = subtract(rounded(multiply(first, cosine), kind), rounded(multiply(second, sine), kind))
        store(head + at, turned, kind)
        cosine, sine = load(cosines + half + at, kind), load(sines + half + at, kind)
        turned = add(rounded(multiply(second, cosine), kind), rounded(multiply(first, sine), kind))
        store(head + half + at, turned, kind)


@inlined
def _copy(source: Any, target: Any, size: Any, kind: Any) -> None:
    for at in range(0, size * bytes_of(kind), LANES * bytes_of(kind)):
        store(target + at, load(source + at, kind), kind)
