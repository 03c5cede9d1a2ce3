"""Attention of single tokens to keys and values that lie in blocks, which are read where they lie.

Torch's kernels take a call for each token and head, of some microseconds, whatever it computes; a step of a few short rows is
thousands of these. Here one call computes all tokens of a layer. Keys come in stretches, and what was summed over earlier ones
is scaled when a larger score is seen: https://arxiv.org/abs/1805.02867. Scores and sums are float32.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from zfabric.backends.hf_transformers.cpu_kernels.available import LANES
from zfabric.backends.hf_transformers.cpu_kernels.compiling import compiled, inlined
from zfabric.backends.hf_transformers.cpu_kernels.vectors import (
    add,
    add_multiples,
    add_products,
    bytes_of,
    exponential,
    larger,
    largest,
    load,
    load_each,
    multiply,
    read,
    read_whole,
    splat,
    store,
    store_each,
    subtract,
    total,
    write,
    write_totals,
    zeros,
)

#: Keys whose scores are held at once: with queries and sums they stay in the first cache.
_STRETCH: Final = 128
_FLOAT_BYTES: Final = 4
_WHOLE_BYTES: Final = 8
_LINE_BYTES: Final = 64
_NOTHING: Final = np.float32(0)
_ONE: Final = np.float32(1)
_NEVER: Final = np.float32(-np.inf)


def space_bytes(each: int, size: int, value_size: int) -> int:
    """Bytes that `attend` wants for itself."""
    return each * (_STRETCH + size + value_size + 2) * _FLOAT_BYTES + _LINE_BYTES


@compiled
def attend(
    queries: Any, keys: Any, values: Any, output: Any, tokens: Any, tables: Any,
    count: Any, step: Any, heads: Any, group: Any, size: Any, value_size: Any, width: Any, block: Any, scale: Any, space: Any,
    kind: Any, each: Any,
) -> None:  # fmt: skip
    """Attention of tokens to keys of their rows.

    Args:
        queries: Address of (all tokens, heads, group, size), tokens lying `step` numbers apart.
        keys, values: Of (places, heads, size) and (places, heads, value size).
        output: Of (all tokens, heads, group, value size).
        tokens: Of (count, 4) int64: a token's place in queries and output, its row, and the first and the end of the keys that it
            sees, of which there is one at least.
        tables: Of (rows, width) int64: blocks of keys.
        heads: Of the cache.
        group: Heads of queries that share one of these, a multiple of the tuple's length.
        size, value_size: Multiples of LANES.
        block: Places of a block.
        scale: Float32.
        space: Address of `space_bytes` that are written over.
        kind: Of all that is at these addresses; see `vectors`.
        each: A tuple with a member for each query that is computed at once.
    """
    item = bytes_of(kind)
    scores = (space + _LINE_BYTES - 1) // _LINE_BYTES * _LINE_BYTES
    asked = scores + len(each) * _STRETCH * _FLOAT_BYTES
    sums = asked + len(each) * size * _FLOAT_BYTES
    most = sums + len(each) * value_size * _FLOAT_BYTES
    shares = most + len(each) * _FLOAT_BYTES
    for index in range(count):
        token = tokens + index * 4 * _WHOLE_BYTES
        place, row = read_whole(token), read_whole(token + _WHOLE_BYTES)
        begin, end = read_whole(token + 2 * _WHOLE_BYTES), read_whole(token + 3 * _WHOLE_BYTES)
        table = tables + row * width * _WHOLE_BYTES
        for head in range(heads):
            for first in range(0, group, len(each)):
                query = queries + (place * step + (head * group + first) * size) * item
                _ask(query, asked, size, scale, kind, each)
                _clear(sums, value_size, most, shares, each)
                for low in range(begin, end, _STRETCH):
                    high = min(low + _STRETCH, end)
                    _score(asked, keys, table, low, high, head, heads, size, block, scores, kind, each)
                    _weigh(scores, high - low, most, shares, sums, value_size, each)
                    _sum(scores, values, table, low, high, head, heads, value_size, block, sums, kind, each)
                told = output + ((place * heads + head) * group + first) * value_size * item
                _tell(told, sums, shares, value_size, kind, each)


@inlined
def _ask(query: Any, asked: Any, size: Any, scale: Any, kind: Any, each: Any) -> None:
    """Scaled queries as float32."""
    factor = splat(scale)
    for at in range(0, len(each) * size, LANES):
        store(asked + at * _FLOAT_BYTES, multiply(load(query + at * bytes_of(kind), kind), factor), _NOTHING)


@inlined
def _clear(sums: Any, value_size: Any, most: Any, shares: Any, each: Any) -> None:
    nothing = splat(_NOTHING)
    for at in range(0, len(each) * value_size, LANES):
        store(sums + at * _FLOAT_BYTES, nothing, _NOTHING)
    for its in range(len(each)):
        write(most + its * _FLOAT_BYTES, _NEVER)
        write(shares + its * _FLOAT_BYTES, _NOTHING)


@inlined
def _run(table: Any, place: Any, high: Any, block: Any) -> Any:
    """Where in the pool a row's token lies, and the end of those that follow it there."""
    index = place // block
    return read_whole(table + index * _WHOLE_BYTES) * block + place - index * block, min((index + 1) * block, high)


@inlined
def _score(
    asked: Any, keys: Any, table: Any, low: Any, high: Any, head: Any, heads: Any, size: Any, block: Any, scores: Any,
    kind: Any, each: Any,
) -> None:  # fmt: skip
    """Scores of a stretch of keys, filled up to whole vectors."""
    line, stripe, item = _STRETCH * _FLOAT_BYTES, size * _FLOAT_BYTES, bytes_of(kind)
    place = low
    while place < high:
        lies, after = _run(table, place, high, block)
        key = keys + (lies * heads + head) * size * item
        for index in range(place - low, after - low):
            found = zeros(each)
            for at in range(0, size, LANES):
                found = add_products(found, load(key + at * item, kind), asked + at * _FLOAT_BYTES, stripe)
            write_totals(found, scores + index * _FLOAT_BYTES, line)
            key += heads * size * item
        place = after
    for its in range(len(each)):
        for index in range(high - low, (high - low + LANES - 1) // LANES * LANES):
            write(scores + its * line + index * _FLOAT_BYTES, _NEVER)


@inlined
def _weigh(scores: Any, count: Any, most: Any, shares: Any, sums: Any, value_size: Any, each: Any) -> None:
    """Scores become weights, and what was summed before is scaled to the largest of all."""
    for its in range(len(each)):
        line = scores + its * _STRETCH * _FLOAT_BYTES
        top = load(line, _NOTHING)
        for at in range(LANES, count, LANES):
            top = larger(top, load(line + at * _FLOAT_BYTES, _NOTHING))
        before = read(most + its * _FLOAT_BYTES)
        highest = max(before, largest(top))
        write(most + its * _FLOAT_BYTES, highest)
        taken, weights = splat(highest), splat(_NOTHING)
        for at in range(0, count, LANES):
            weight = exponential(subtract(load(line + at * _FLOAT_BYTES, _NOTHING), taken))
            weights = add(weights, weight)
            store(line + at * _FLOAT_BYTES, weight, _NOTHING)
        kept = read(shares + its * _FLOAT_BYTES)
        if highest > before and kept > _NOTHING:
            factor = exponential(splat(before - highest))
            kept *= total(factor) / np.float32(LANES)
            begin = sums + its * value_size * _FLOAT_BYTES
            for at in range(0, value_size, LANES):
                place = begin + at * _FLOAT_BYTES
                store(place, multiply(load(place, _NOTHING), factor), _NOTHING)
        write(shares + its * _FLOAT_BYTES, kept + total(weights))


@inlined
def _sum(
    scores: Any, values: Any, table: Any, low: Any, high: Any, head: Any, heads: Any, value_size: Any, block: Any, sums: Any,
    kind: Any, each: Any,
) -> None:  # fmt: skip
    """Add values of a stretch by their weights."""
    line, stripe, item = _STRETCH * _FLOAT_BYTES, value_size * _FLOAT_BYTES, bytes_of(kind)
    for at in range(0, value_size, LANES):
        found = load_each(each, sums + at * _FLOAT_BYTES, stripe)
        place = low
        while place < high:
            lies, after = _run(table, place, high, block)
            value = values + ((lies * heads + head) * value_size + at) * item
            for index in range(place - low, after - low):
                found = add_multiples(found, load(value, kind), scores + index * _FLOAT_BYTES, line)
                value += heads * value_size * item
            place = after
        store_each(found, sums + at * _FLOAT_BYTES, stripe)


@inlined
def _tell(output: Any, sums: Any, shares: Any, value_size: Any, kind: Any, each: Any) -> None:
    for its in range(len(each)):
        factor = splat(_ONE / read(shares + its * _FLOAT_BYTES))
        for at in range(its * value_size, (its + 1) * value_size, LANES):
            store(output + at * bytes_of(kind), multiply(load(sums + at * _FLOAT_BYTES, _NOTHING), factor), kind)
