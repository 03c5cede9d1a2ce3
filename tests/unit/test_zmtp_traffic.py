"""Traffic's own way to libsodium against PyNaCl's public functions: the same boxes, and the same refusals."""

from __future__ import annotations

import random

import pytest
from nacl import bindings

from zfabric.zmtp.faults import HandshakeError
from zfabric.zmtp.traffic import Opener, Sealer

KEY = random.Random(1).randbytes(32)
PREFIX = b"CurveZMQMESSAGEC"
BEFORE = b"\x07MESSAGE"
START = len(BEFORE) + 8
#: About the memory that a connection keeps, and beyond it.
SIZES = [1, 2, 100, 1_023, 1_024, 1_025, 5_000, 300_000]


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def test_boxes_are_those_of_pynacls_public_functions() -> None:
    rng = random.Random(2)
    sealer, opener = Sealer(KEY, PREFIX, BEFORE), Opener(KEY, PREFIX)
    texts = [rng.randbytes(size) for size in SIZES + SIZES[::-1] + [rng.randrange(1, 2_000) for _ in range(50)]]
    made = [sealer.seal(number(count), text) for count, text in enumerate(texts)]
    for count, (text, message) in enumerate(zip(texts, made, strict=True)):
        box = bindings.crypto_box_easy_afternm(text, PREFIX + number(count), KEY)
        assert message == BEFORE + number(count) + box
        assert type(message) is bytes
        found = opener.open(number(count), message, START)
        assert found == (text[0], text[1:])
        assert type(found[1]) is bytes


@pytest.mark.parametrize("size", [1, 100, 1_024, 1_025, 5_000])
def test_a_box_of_another_key_direction_number_or_text_is_not_opened(size: int) -> None:
    text = bytes(size)
    message = Sealer(KEY, PREFIX, BEFORE).seal(number(7), text)
    opener = Opener(KEY, PREFIX)
    for wrong in (
        Opener(bytes(32), PREFIX),
        Opener(KEY, b"CurveZMQMESSAGES"),
    ):
        with pytest.raises(HandshakeError, match="MESSAGE"):
            wrong.open(number(7), message, START)
    with pytest.raises(HandshakeError, match="MESSAGE"):
        opener.open(number(8), message, START)
    for position in {START, START + 15, START + 16, len(message) - 1}:
        changed = bytearray(message)
        changed[position] ^= 1
        with pytest.raises(HandshakeError, match="MESSAGE"):
            opener.open(number(7), bytes(changed), START)
    # A refusal leaves nothing behind.
    assert opener.open(number(7), message, START) == (0, bytes(size - 1))
