"""Several messages as one input: what a peer says, one after the other, as bytes that can be changed anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Step(NamedTuple):
    """One message, or one other thing that happens.

    Attributes:
        who: Which peer, or what; the target says what numbers mean.
        header, body: The frames.
    """

    who: int
    header: bytes
    body: bytes


def written(steps: Iterable[Step]) -> bytes:
    """Steps as bytes."""
    return b"".join(
        bytes([who]) + len(header).to_bytes(2, "big") + header + len(body).to_bytes(2, "big") + body
        for who, header, body in steps
    )


def read(data: bytes, most: int = 64) -> Iterator[Step]:
    """Bytes as steps: any bytes are some."""
    place = 0
    for _ in range(most):
        if place >= len(data):
            return
        who, place = data[place], place + 1
        header, place = _part(data, place)
        body, place = _part(data, place)
        yield Step(who, header, body)


def _part(data: bytes, place: int) -> tuple[bytes, int]:
    size = int.from_bytes(data[place : place + 2], "big")
    place += 2
    return data[place : place + size], place + size
