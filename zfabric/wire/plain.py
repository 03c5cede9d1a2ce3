"""What others compute with, as what MessagePack knows: scalars and arrays of NumPy and torch are the numbers they hold.

The encoder asks only for types that it does not know, so nobody pays for this who hands over plain values.
"""

from __future__ import annotations

from operator import index
from typing import Any, Final

import msgspec


def plain(value: Any) -> Any:
    """The numbers in an array or a scalar of one.

    Raises:
        TypeError: It is neither, so it cannot be sent.
    """
    tolist = getattr(value, "tolist", None)
    if tolist is None:
        raise TypeError(f"a value of type {type(value).__name__} cannot be sent")
    return tolist()


def plain_integer(value: Any) -> int:
    """An integer of any make. Raises: TypeError: It is none."""
    return int(index(value))


#: As `codec.encode`, for what comes from a backend.
encode_plain: Final = msgspec.msgpack.Encoder(enc_hook=plain).encode

#: What an encoder raises for values that it cannot take: of no known type, too large, or not text.
ENCODING_ERRORS: Final = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
