"""libsodium's boxes as CURVE uses them in handshakes, through PyNaCl, which only this and traffic.py import.

Loaded when a connection with keys is made, not before: nobody else needs the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nacl import bindings
from nacl.exceptions import CryptoError

from zfabric.zmtp.faults import HandshakeError

KEY_BYTES: Final = bindings.crypto_box_PUBLICKEYBYTES
#: A box is so much larger than what is in it.
MAC_BYTES: Final = bindings.crypto_secretbox_MACBYTES

#: random(count): so many octets that nobody can guess.
Random = Callable[[int], bytes]


def key_pair(random: Random) -> tuple[bytes, bytes]:
    """A new pair: public and secret half."""
    secret = random(KEY_BYTES)
    return bindings.crypto_scalarmult_base(secret), secret


def shared_key(public: bytes, secret: bytes) -> bytes:
    """What both sides of a box compute from the other's public and their own secret key.

    Raises:
        HandshakeError: The public key is one that gives every secret the same result.
    """
    try:
        return bindings.crypto_box_beforenm(public, secret)
    except (CryptoError, RuntimeError) as error:
        raise HandshakeError("the peer's public key is not usable") from error


def seal(shared: bytes, nonce: bytes, text: bytes) -> bytes:
    """A box of a text."""
    return bindings.crypto_box_easy_afternm(text, nonce, shared)


def open_box(shared: bytes, nonce: bytes, box: bytes, what: str) -> bytes:
    """The text of a box. Raises: HandshakeError: it was not made with this key and nonce."""
    try:
        return bindings.crypto_box_open_easy_afternm(box, nonce, shared)
    except (CryptoError, TypeError) as error:
        raise HandshakeError(f"the box of {what} cannot be opened") from error


def seal_secret(key: bytes, nonce: bytes, text: bytes) -> bytes:
    """A box that only its maker can open."""
    return bindings.crypto_secretbox_easy(text, nonce, key)


def open_secret(key: bytes, nonce: bytes, box: bytes, what: str) -> bytes:
    """The text of a box of one's own. Raises: HandshakeError: it is none."""
    try:
        return bindings.crypto_secretbox_open_easy(box, nonce, key)
    except (CryptoError, TypeError) as error:
        raise HandshakeError(f"{what} is not one of ours") from error
