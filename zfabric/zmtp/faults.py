"""What can be wrong with a peer's bytes, as types."""

from __future__ import annotations


class ZmtpError(Exception):
    """The peer's bytes break ZMTP. The connection has to be closed; `reply` is to be sent before, if there is any.

    It does not leave the driver of a connection: what a program is told is that there is no connection, and why.

    Args:
        message: What was found.
        reply: A command that tells the peer.
        details: The message's values by name.
    """

    def __init__(self, message: str, *, reply: bytes = b"", **details: str | int) -> None:
        super().__init__(message)
        self.reply = reply
        self.details = details


class GreetingError(ZmtpError):
    """The peer does not speak ZMTP 3, or has another security mechanism."""


class FramingError(ZmtpError):
    """A frame whose flags or place the protocol does not allow."""


class OversizeError(ZmtpError):
    """A frame or message is announced that is larger, or has more frames, than is allowed."""


class HandshakeError(ZmtpError):
    """A command of the handshake is malformed, out of turn, or its cryptography does not hold."""


class DeniedError(ZmtpError):
    """One peer refuses the other's key: to come back with the same key is of no use."""
