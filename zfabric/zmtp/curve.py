"""The CURVE mechanism: both sides prove a key, and everything is encrypted (RFC 26, CurveZMQ; RFC 25 puts it into ZMTP).

C and S are the long-term keys of client and server, C' and S' those of this connection; the secret halves are c, s, c', s'.
Box [X](A->B) is X in a box that A's secret and B's public key make.

C1  The client sends HELLO, 200 octets: version 1.0, 72 octets of padding, C', nonce, Box [64 zeros](C'->S).
                                                                                                 [The HELLO Command]
C2  The server answers WELCOME, 168 octets: nonce, Box [S' + cookie](S->C'). The cookie holds C' and s' under a key that
    the server makes for it; it forgets s'.                                                    [The WELCOME Command]
C3  The client sends INITIATE, 257 octets or more: cookie, nonce, Box [C + vouch + metadata](C'->S'). The vouch is
    a nonce and Box [C' + S](C->S'): who made it has c, and made it for this connection to this server.
                                                                                              [The INITIATE Command]
C4  The server takes s' from the cookie, checks that the cookie and the vouch hold C', and the vouch S, and asks whether
    C may connect. If it may not, the answer is ERROR.                         [The INITIATE Command, The ERROR Command]
    libzmq checks C' in the vouch and not S; a vouch that names S is what the RFC has the client send.
C5  The server answers READY, 30 octets or more: nonce, Box [metadata](S'->C').                    [The READY Command]
C6  From then on each frame is a MESSAGE, 33 octets or more: nonce, Box [flags + data] between C' and S'. Nonces have
    another prefix in each direction, so neither side's box can be sent back to it.              [The MESSAGE Command]
C7  The eight-octet nonces of one side rise with each command. One that does not is an error.      [The HELLO Command]
C8  Sixteen-octet nonces are random.                                                            [The WELCOME Command]
C9  Of the inner flags, bit 0 is MORE. Bit 1 is COMMAND in libzmq, which sends its PINGs so; the rest is zero.
                                                                                                [The MESSAGE Command]
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Final

from zfabric.zmtp.boxes import KEY_BYTES, MAC_BYTES, Random, key_pair, open_box, open_secret, seal, seal_secret
from zfabric.zmtp.boxes import shared_key as shared
from zfabric.zmtp.faults import DeniedError, FramingError, HandshakeError
from zfabric.zmtp.frames import COMMAND, MORE, command
from zfabric.zmtp.metadata import check_peer, error_command, error_reason, own_properties, parse_properties
from zfabric.zmtp.traffic import Opener, Sealer

_VERSION: Final = b"\x01\x00"
_PADDING: Final = bytes(72)
_ZEROS: Final = bytes(64)
#: Sizes of what follows a command's name.
_HELLO_BYTES: Final = 194
_WELCOME_BYTES: Final = 160
_INITIATE_BYTES_MIN: Final = 248
_READY_BYTES_MIN: Final = 24
_COOKIE_BYTES: Final = 96
_VOUCH_BYTES: Final = 96

_MESSAGE: Final = b"\x07MESSAGE"
_MESSAGE_HEAD_BYTES: Final = len(_MESSAGE) + 8
#: Octets that a message's frame is larger than what it carries (C6).
OVERHEAD_BYTES: Final = _MESSAGE_HEAD_BYTES + MAC_BYTES + 1
#: libzmq's bit for a command inside of a MESSAGE (C9).
_INNER_COMMAND: Final = 2
#: By a frame's flags, the inner flags as they are sent, and the other way round.
_SENT: Final = {0: b"\0", MORE: b"\1", COMMAND: b"\2"}
_HEARD: Final = {0: 0, MORE: MORE, _INNER_COMMAND: COMMAND}
#: RFC 27's status for "not allowed", which libzmq's clients understand.
_DENIED: Final = b"400"


class _Boxes:
    """What both roles share: nonces, and messages once the key of the connection is known."""

    name = b"CURVE"
    plain = False
    overhead = OVERHEAD_BYTES

    def __init__(self, socket_type: bytes, random: Random, sends: bytes, receives: bytes) -> None:
        self.ready = False
        self.peer_key = b""
        self._socket_type = socket_type
        self._random = random
        self._sent = 0
        self._received = 0
        self._prefixes = sends, receives
        self._key = b""
        self._sealer: Sealer | None = None
        self._opener: Opener | None = None

    def _begin_traffic(self) -> None:
        """The handshake is over."""
        sends, receives = self._prefixes
        self._sealer = Sealer(self._key, sends, _MESSAGE)
        self._opener = Opener(self._key, receives)
        self.ready = True

    def _next_nonce(self) -> bytes:
        """C7. The first is 1, as libzmq's."""
        self._sent += 1
        return self._sent.to_bytes(8, "big")

    def _check_nonce(self, nonce: bytes) -> bytes:
        """C7."""
        number = int.from_bytes(nonce, "big")
        if number <= self._received:
            raise HandshakeError(f"nonce {number} after {self._received}: a command comes twice", nonce=number)
        self._received = number
        return nonce

    def seal(self, flags: int, body: bytes) -> bytes:
        """The MESSAGE that carries a frame."""
        assert self._sealer is not None
        self._sent = number = self._sent + 1  # C7
        return self._sealer.seal(number.to_bytes(8, "big"), _SENT[flags] + body)

    def open(self, body: bytes) -> tuple[int, bytes]:
        """The frame that a MESSAGE carries: flags and body.

        Raises:
            FramingError: It is no MESSAGE, or its flags are not allowed.
            HandshakeError: It was not made by the peer, or was sent before.
        """
        if len(body) < OVERHEAD_BYTES or not body.startswith(_MESSAGE):
            raise FramingError("a frame that is no MESSAGE comes after the handshake")
        assert self._opener is not None
        nonce = self._check_nonce(body[len(_MESSAGE) : _MESSAGE_HEAD_BYTES])
        inner, text = self._opener.open(nonce, body, _MESSAGE_HEAD_BYTES)
        flags = _HEARD.get(inner)
        if flags is None:  # C9; F3 holds inside as well
            raise FramingError(f"a MESSAGE has flags 0x{inner:02x}", flags=inner)
        return flags, text


class CurveClient(_Boxes):
    """The side that knows whom it wants to speak to.

    Args:
        socket_type: This side's.
        public, secret: C and c, 32 octets each.
        server: S.
        random: Where keys and nonces come from.
    """

    as_server = False

    def __init__(self, socket_type: bytes, public: bytes, secret: bytes, server: bytes, random: Random) -> None:
        super().__init__(socket_type, random, b"CurveZMQMESSAGEC", b"CurveZMQMESSAGES")
        self._public = public
        self._secret = secret
        self._server = server
        self._own_public, self._own_secret = key_pair(random)
        self._waits_for = b"WELCOME"

    def start(self) -> bytes:
        """HELLO (C1)."""
        nonce = self._next_nonce()
        box = seal(shared(self._server, self._own_secret), b"CurveZMQHELLO---" + nonce, _ZEROS)
        return command(b"HELLO", _VERSION + _PADDING + self._own_public + nonce + box)

    def receive(self, name: bytes, data: bytes) -> bytes:
        """A command of the server. Returns what to send.

        Raises:
            DeniedError: The server does not want this key.
            HandshakeError: The server is not the one that it should be, or speaks out of turn.
        """
        if name == b"ERROR":
            reason = error_reason(data)
            raise DeniedError(f"the peer refuses this key: {reason}", reason=reason)
        if name != self._waits_for:
            raise HandshakeError(f"command {name[:32]!r} in place of {self._waits_for.decode()}")
        if name == b"WELCOME":
            return self._welcome(data)
        self._finish(data)
        return b""

    def _welcome(self, data: bytes) -> bytes:
        """C2, then C3."""
        if len(data) != _WELCOME_BYTES:
            raise HandshakeError(f"WELCOME of {len(data)} octets, {_WELCOME_BYTES} are needed")
        text = open_box(shared(self._server, self._own_secret), b"WELCOME-" + data[:16], data[16:], "WELCOME")
        their_public, cookie = text[:KEY_BYTES], text[KEY_BYTES:]
        self._key = shared(their_public, self._own_secret)
        long_nonce = self._random(16)  # C8
        vouch = seal(shared(their_public, self._secret), b"VOUCH---" + long_nonce, self._own_public + self._server)
        nonce = self._next_nonce()
        text = self._public + long_nonce + vouch + own_properties(self._socket_type)
        self._waits_for = b"READY"
        return command(b"INITIATE", cookie + nonce + seal(self._key, b"CurveZMQINITIATE" + nonce, text))

    def _finish(self, data: bytes) -> None:
        """C5."""
        if len(data) < _READY_BYTES_MIN:
            raise HandshakeError(f"READY of {len(data)} octets, {_READY_BYTES_MIN} are needed")
        nonce = self._check_nonce(data[:8])
        text = open_box(self._key, b"CurveZMQREADY---" + nonce, data[8:], "READY")
        check_peer(self._socket_type, parse_properties(text))
        self.peer_key = self._server
        self._begin_traffic()


class CurveServer(_Boxes):
    """The side that others want to speak to.

    Args:
        socket_type: This side's.
        public, secret: S and s, 32 octets each.
        allows: Whether a client with key C may connect.
        random: Where keys and nonces come from.
    """

    as_server = True

    def __init__(
        self, socket_type: bytes, public: bytes, secret: bytes, allows: Callable[[bytes], bool], random: Random
    ) -> None:
        super().__init__(socket_type, random, b"CurveZMQMESSAGES", b"CurveZMQMESSAGEC")
        self._public = public
        self._secret = secret
        self._allows = allows
        self._client = b""
        self._cookie_key = b""

    def start(self) -> bytes:
        """Nothing: the client speaks first."""
        return b""

    def receive(self, name: bytes, data: bytes) -> bytes:
        """A command of the client. Returns what to send.

        Raises:
            DeniedError: The client's key is not wanted. Its reply is an ERROR.
            HandshakeError: The client does not prove its key, or speaks out of turn.
        """
        expected = b"INITIATE" if self._client else b"HELLO"
        if name != expected:
            raise HandshakeError(f"command {name[:32]!r} in place of {expected.decode()}")
        return self._initiate(data) if self._client else self._hello(data)

    def _hello(self, data: bytes) -> bytes:
        """C1, then C2."""
        if len(data) != _HELLO_BYTES or data[:2] != _VERSION:
            raise HandshakeError(f"HELLO of {len(data)} octets and version {data[:2].hex()}, 194 and 0100 are needed")
        client, nonce = data[74:106], self._check_nonce(data[106:114])
        key = shared(client, self._secret)
        if open_box(key, b"CurveZMQHELLO---" + nonce, data[114:], "HELLO") != _ZEROS:
            raise HandshakeError("the box of HELLO does not hold zeros")
        self._client = client
        own_public, own_secret = key_pair(self._random)
        self._cookie_key, cookie_nonce = self._random(KEY_BYTES), self._random(16)  # C8
        cookie = cookie_nonce + seal_secret(self._cookie_key, b"COOKIE--" + cookie_nonce, client + own_secret)
        welcome_nonce = self._random(16)
        return command(b"WELCOME", welcome_nonce + seal(key, b"WELCOME-" + welcome_nonce, own_public + cookie))

    def _initiate(self, data: bytes) -> bytes:
        """C3 and C4, then C5."""
        if len(data) < _INITIATE_BYTES_MIN:
            raise HandshakeError(f"INITIATE of {len(data)} octets, {_INITIATE_BYTES_MIN} are needed")
        cookie_key, self._cookie_key = self._cookie_key, b""
        cookie = open_secret(cookie_key, b"COOKIE--" + data[:16], data[16:_COOKIE_BYTES], "the cookie")
        own_secret = cookie[KEY_BYTES:]
        if not hmac.compare_digest(cookie[:KEY_BYTES], self._client):
            raise HandshakeError("the cookie is another client's")
        self._key = shared(self._client, own_secret)
        nonce = self._check_nonce(data[_COOKIE_BYTES : _COOKIE_BYTES + 8])
        text = open_box(self._key, b"CurveZMQINITIATE" + nonce, data[_COOKIE_BYTES + 8 :], "INITIATE")
        key, vouch, properties = text[:KEY_BYTES], text[KEY_BYTES:][:_VOUCH_BYTES], text[KEY_BYTES + _VOUCH_BYTES :]
        vouched = open_box(shared(key, own_secret), b"VOUCH---" + vouch[:16], vouch[16:], "the vouch")
        if not hmac.compare_digest(vouched, self._client + self._public):
            raise HandshakeError("the vouch is for another connection or another server")
        if not self._allows(key):
            raise DeniedError("the peer's key is not known here", reply=error_command(_DENIED))
        check_peer(self._socket_type, parse_properties(properties))
        self.peer_key = key
        self._begin_traffic()
        nonce = self._next_nonce()
        return command(
            b"READY", nonce + seal(self._key, b"CurveZMQREADY---" + nonce, own_properties(self._socket_type))
        )
