"""A DEALER of one connection: it tells when it was made and when it was lost."""

from __future__ import annotations

import time
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class Connection:
    """One connection to a controller. A lost one is not used again: who has lost it makes another.

    Args:
        key, controller_key: Certificate files, where the controller has keys.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        key: Path | None = None,
        controller_key: Path | None = None,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 200
        if key is not None and controller_key is not None:
            self.socket.curve_publickey, secret = zmq.auth.load_certificate(key)
            assert secret is not None
            self.socket.curve_secretkey = secret
            self.socket.curve_serverkey, _ = zmq.auth.load_certificate(controller_key)
        self._monitor = self.socket.get_monitor_socket(_EVENTS)
        self.socket.connect(endpoint)
        self.up = False
        self.lost = False
        self.heard = time.monotonic()

    def receive(self, timeout_s: float) -> list[bytes] | None:
        """The next message, or None if none came in time or the connection came or went."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(int(timeout_s * 1_000)))
        if self.socket in ready:
            self.heard = time.monotonic()
            return self.socket.recv_multipart()
        if self._monitor in ready:
            event = recv_monitor_message(self._monitor)["event"]
            self.up = self.up or event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.lost = self.lost or event == zmq.EVENT_DISCONNECTED
        return None

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
