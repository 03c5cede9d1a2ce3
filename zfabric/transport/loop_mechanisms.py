"""ZMTP connections as the fabric wants them: bounds, and the mechanism that the keys ask for."""

from __future__ import annotations

import os
from typing import Final

from zfabric import limits
from zfabric.errors import ConfigurationError
from zfabric.transport.curve import ControllerKeys, Credentials
from zfabric.zmtp import z85
from zfabric.zmtp.connection import Connection
from zfabric.zmtp.frames import Bounds
from zfabric.zmtp.metadata import DEALER, ROUTER
from zfabric.zmtp.null import Null


def _bounds(frame_bytes: int, ahead_bytes: int) -> Bounds:
    return Bounds(
        frame_bytes=frame_bytes,
        message_frames=limits.MESSAGE_FRAMES_MAX,
        message_bytes=frame_bytes + limits.CONTROL_BODY_BYTES_MAX,
        command_bytes=limits.COMMAND_BYTES_MAX,
        ahead_bytes=ahead_bytes,
    )


#: What a peer may send that has a session, and one that has none: a HELLO is the largest that it has to say.
SESSION_BOUNDS: Final = _bounds(limits.FRAME_BYTES_MAX, limits.BODY_AHEAD_BYTES)
STRANGER_BOUNDS: Final = _bounds(limits.CONTROL_BODY_BYTES_MAX, limits.STRANGER_BODY_AHEAD_BYTES)


def _octets(key: bytes, what: str) -> bytes:
    try:
        octets = z85.decode(key)
    except ValueError as error:
        raise ConfigurationError(f"{what} is not a key: {error}") from error
    if len(octets) != 32:
        raise ConfigurationError(f"{what} has {len(octets)} octets, a key has 32")
    return octets


class RouterConnections:
    """Makes the controller's side of connections. Raises: ConfigurationError, if a key is none."""

    def __init__(self, keys: ControllerKeys | None) -> None:
        self._keys = keys
        if keys is not None:
            self._public = _octets(keys.keys.public, "the controller's public key")
            self._secret = _octets(keys.keys.secret, "the controller's secret key")

    def make(self) -> Connection:
        """One for a new peer."""
        if self._keys is None:
            return Connection(Null(ROUTER), STRANGER_BOUNDS)
        # PyNaCl is loaded by those who have keys.
        from zfabric.zmtp.curve import CurveServer

        return Connection(CurveServer(ROUTER, self._public, self._secret, self._allows, os.urandom), STRANGER_BOUNDS)

    def _allows(self, key: bytes) -> bool:
        assert self._keys is not None
        return self._keys.allows(z85.encode(key))


class DealerConnections:
    """Makes a client's or worker's side of connections. Raises: ConfigurationError, if a key is none."""

    def __init__(self, credentials: Credentials | None) -> None:
        self._guarded = credentials is not None
        if credentials is not None:
            self._public = _octets(credentials.keys.public, "the public key")
            self._secret = _octets(credentials.keys.secret, "the secret key")
            self._controller = _octets(credentials.controller, "the controller's public key")

    def make(self) -> Connection:
        """One for a new try."""
        if not self._guarded:
            return Connection(Null(DEALER), SESSION_BOUNDS)
        from zfabric.zmtp.curve import CurveClient

        return Connection(CurveClient(DEALER, self._public, self._secret, self._controller, os.urandom), SESSION_BOUNDS)
