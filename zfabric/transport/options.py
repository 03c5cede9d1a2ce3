"""Socket options, every one spelled out with its why. All are set before bind or connect: later ones are ignored."""

from __future__ import annotations

import zmq

from zfabric import limits
from zfabric.transport.curve import ZAP_DOMAIN, ControllerKeys, Credentials, set_controller_keys, set_credentials


def set_router_options(socket: zmq.Socket[bytes], keys: ControllerKeys | None) -> None:
    """Options of the controller's socket."""
    _set_common(socket)
    # An unknown peer raises EHOSTUNREACH and a full one EAGAIN, instead of a silent drop: both are events for the core.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # With handover the newest connection could take another's identity. Peers set none; the ROUTER assigns.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN.encode())
    if keys is not None:
        set_controller_keys(socket, keys)
    # The kernel's default of 100 is too short for a thousand peers that return at once.
    socket.setsockopt(zmq.BACKLOG, 4_096)


def set_dealer_options(socket: zmq.Socket[bytes], credentials: Credentials | None) -> None:
    """Options of a client's or worker's socket."""
    _set_common(socket)
    if credentials is not None:
        set_credentials(socket, credentials)
    # Nothing is queued for a controller that is not there: the sessions know what to send to the next one.
    socket.setsockopt(zmq.IMMEDIATE, 1)
    # The dialer decides when to try again, and where. A cap keeps libzmq from drawing jitter from the program's rand().
    socket.setsockopt(zmq.RECONNECT_IVL, limits.NEVER_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, limits.NEVER_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, limits.CONNECT_MS)


def _set_common(socket: zmq.Socket[bytes]) -> None:
    # The default waits for ever for a dead peer at exit. Farewells are messages of the protocol.
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, limits.SOCKET_QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, limits.SOCKET_QUEUE_MESSAGES)
    # The default is no limit.
    socket.setsockopt(zmq.MAXMSGSIZE, limits.FRAME_BYTES_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, limits.HANDSHAKE_MS)
    # ZMTP's own ping finds paths that died without a word; it does not see a program that hangs, beats do.
    socket.setsockopt(zmq.HEARTBEAT_IVL, limits.ZMTP_PING_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, limits.ZMTP_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, limits.ZMTP_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
