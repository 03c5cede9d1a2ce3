"""The NULL mechanism: no authentication, no confidentiality (RFC 37, "The NULL Security Mechanism").

N1  Each side sends READY with its metadata, and is done when it has sent and received one.
N2  ERROR instead of READY is the end of the connection.
N3  Nothing else may come before READY, and READY comes once.

The RFC has the server wait for the client's READY. libzmq does not wait, and neither does this: it makes no difference to
a peer that does.
"""

from __future__ import annotations

from zfabric.zmtp.faults import DeniedError, HandshakeError
from zfabric.zmtp.frames import command
from zfabric.zmtp.metadata import check_peer, error_reason, own_properties, parse_properties


class Null:
    """One connection's handshake without keys.

    Args:
        socket_type: This side's.
    """

    name = b"NULL"
    as_server = False
    #: Messages are sent as they are.
    plain = True
    #: Bytes that the mechanism adds to a frame.
    overhead = 0
    peer_key = b""

    def __init__(self, socket_type: bytes) -> None:
        self.ready = False
        self._socket_type = socket_type

    def start(self) -> bytes:
        """What to send once the greetings are exchanged."""
        return command(b"READY", own_properties(self._socket_type))

    def receive(self, name: bytes, data: bytes) -> bytes:
        """A command of the handshake. Returns what to send.

        Raises:
            HandshakeError: By N3, or the metadata are bad.
            DeniedError: By N2.
        """
        if name == b"READY":
            check_peer(self._socket_type, parse_properties(data))
            self.ready = True  # N1
            return b""
        if name == b"ERROR":  # N2
            reason = error_reason(data)
            raise DeniedError(f"the peer refuses this connection: {reason}", reason=reason)
        raise HandshakeError(f"command {name[:32]!r} in place of READY")  # N3

    def seal(self, flags: int, body: bytes) -> bytes:
        """Never needed: `plain`."""
        raise NotImplementedError

    def open(self, body: bytes) -> tuple[int, bytes]:
        """Never needed: `plain`."""
        raise NotImplementedError
