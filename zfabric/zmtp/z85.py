"""Z85, the printable form of keys (RFC 32): five characters for four octets."""

from __future__ import annotations

from typing import Final

_ALPHABET: Final = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_VALUES: Final = {character: value for value, character in enumerate(_ALPHABET)}


def encode(data: bytes) -> bytes:
    """Octets, a multiple of four, as text."""
    text = bytearray()
    for start in range(0, len(data), 4):
        number = int.from_bytes(data[start : start + 4], "big")
        text += bytes(_ALPHABET[number // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return bytes(text)


def decode(text: bytes) -> bytes:
    """Text as octets.

    Raises:
        ValueError: Not a multiple of five characters, or one that Z85 does not have, or a group beyond 32 bits.
    """
    if len(text) % 5:
        raise ValueError(f"Z85 text of {len(text)} characters, a multiple of 5 is needed")
    data = bytearray()
    for start in range(0, len(text), 5):
        number = 0
        for character in text[start : start + 5]:
            if character not in _VALUES:
                raise ValueError(f"Z85 text has character {character:#x}")
            number = number * 85 + _VALUES[character]
        if number >> 32:
            raise ValueError("Z85 text has a group beyond 32 bits")
        data += number.to_bytes(4, "big")
    return bytes(data)
