"""Changes to inputs, drawn by a seed: what a short run uses, where nothing looks at the code that they reach."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

#: Bytes that mean much: the ends of MessagePack's small kinds, its heads of long ones, flags of frames, JSON's signs.
_TELLING: Final = (
    bytes([0, 1, 2, 4, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, *range(0xC2, 0xE0), 0xFF])
    + b'{}[]":,\\u\n'
)
_NUMBERS: Final = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(seeds: Sequence[bytes], seed: int, count: int, longest: int = 4_096) -> Iterator[bytes]:
    """So many inputs made from seeds, the same for the same number.

    Args:
        longest: Bytes of an input at most.
    """
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            _change(data, rng, seeds)
        yield bytes(data[:longest])


def _change(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    place = rng.randrange(len(data) + 1)
    size = rng.choice((1, 1, 2, 4, 8, 64))
    match rng.randrange(8):
        case 0 if data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        case 1:
            data[place : place + 1] = bytes([rng.choice(_TELLING)])
        case 2:
            data[place:place] = rng.randbytes(size)
        case 3:
            del data[place : place + size]
        case 4:
            number = rng.choice(_NUMBERS)
            data[place : place + size] = number.to_bytes(8, "big")[-size:]
        case 5:
            data[place:place] = data[place : place + size] * rng.choice((1, 2, 50))
        case 6:
            other = rng.choice(seeds)
            begin = rng.randrange(len(other) + 1)
            data[place : place + size] = other[begin : begin + rng.choice((size, 200))]
        case _:
            del data[place:]
