"""Peers that are not the library's: plain sockets of ZeroMQ that send what they are told to, and one of TCP that speaks ZMTP."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from typing import Any, Self

import zmq

from zfabric.errors import FabricError
from zfabric.transport.curve import Credentials, set_credentials
from zfabric.transport.dealer import DealerLink
from zfabric.wire import codec, kinds
from zfabric.wire.load import Load
from zfabric.wire.messages import Beat, ClientHello, ModelInfo, Welcome, WorkerHello

#: How long an answer may take on a loaded machine.
_PATIENCE_MS = 20_000


class RawPeer:
    """A DEALER."""

    def __init__(self, endpoint: str, credentials: Credentials | None = None, **options: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        if credentials is not None:
            set_credentials(self.socket, credentials)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name.upper()), value)
        self.socket.connect(endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, *frames: Any) -> None:
        self.socket.send_multipart(frames)

    def receive(self) -> list[bytes]:
        """The next message. Raises: TimeoutError."""
        if not self.socket.poll(_PATIENCE_MS):
            raise TimeoutError("no message came")
        return self.socket.recv_multipart()

    def receive_kind(self, *wanted: int) -> list[bytes]:
        """The next message of one of these kinds."""
        while True:
            frames = self.receive()
            if frames[0][0] in wanted:
                return frames

    def hello_as_client(self, instance: int = 7) -> Welcome:
        """Open a session."""
        return self._hello(ClientHello(version=kinds.PROTOCOL_VERSION, build="raw", instance=instance))

    def hello_as_worker(self, name: str, model: str, slots: int = 64) -> Welcome:
        """Open a session as a worker that reports nothing."""
        return self._hello(
            WorkerHello(
                version=kinds.PROTOCOL_VERSION,
                build="raw",
                name=name,
                instance=9,
                models=[ModelInfo(name=model, capabilities=["generate"])],
                load=Load(slots=slots),
                beats=False,
            )
        )

    def _hello(self, hello: ClientHello | WorkerHello) -> Welcome:
        self.send(codec.pack(hello)[0])
        welcome: Welcome = codec.unpack_control(self.receive_kind(kinds.WELCOME)[0])
        return welcome

    def close(self) -> None:
        self.socket.close()
        self._context.term()


class RawController:
    """A ROUTER that frames as it likes, and a DealerLink to it whose receiver keeps what comes."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.rcvhwm = 1
        self._router.bind(endpoint)
        self._got: list[tuple[bytes, bytes]] = []
        self._up, self._arrived = asyncio.Event(), asyncio.Event()
        self.link = DealerLink(endpoint, self, random.Random(1))

    async def dealt(self) -> DealerLink:
        """The link, once it is connected and its address is known."""
        async with asyncio.timeout(_PATIENCE_MS / 1_000):
            await self._up.wait()
        self.link.send_all([codec.pack(Beat(7))])
        self._address = (await asyncio.to_thread(self._router.recv_multipart))[0]
        return self.link

    def send(self, *frames: bytes) -> None:
        self._router.send_multipart([self._address, *frames])

    def receive(self) -> list[bytes]:
        """The next message. Raises: TimeoutError."""
        if not self._router.poll(_PATIENCE_MS):
            raise TimeoutError("no message came")
        return self._router.recv_multipart()[1:]

    async def delivered(self, count: int) -> list[tuple[bytes, bytes]]:
        """What the link handed over, once there is so much."""
        async with asyncio.timeout(_PATIENCE_MS / 1_000):
            while len(self._got) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return self._got

    def link_up(self) -> None:
        self._up.set()

    def link_down(self) -> None:
        raise AssertionError("the router is there")

    def link_denied(self, error: FabricError) -> None:
        raise error

    def link_message(self, header: bytes, body: bytes) -> None:
        self._got.append((header, body))
        self._arrived.set()

    def link_idle(self) -> None:
        """Nothing is sent in answer."""

    def close(self) -> None:
        self.link.close()
        self._router.close()
        self._context.term()


class RawZmtp:
    """A TCP connection that has done the handshake of ZMTP 3.1 without security, byte by byte."""

    def __init__(self, endpoint: str, identity: bytes = b"") -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=_PATIENCE_MS / 1_000)
        self.socket.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
        self.greeting = self._exactly(64)
        ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", identity)
        self.socket.sendall(b"\x04" + bytes([len(ready)]) + ready)
        self._exactly(self._exactly(2)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise EOFError("the connection was closed")
            data += more
        return data

    def send_without_end(self, frames: int) -> bool:
        """Send so many frames of one message, each of one byte, and no last one. Whether the other end took all of them."""
        portion = b"\x01\x01x" * 1_000
        try:
            for _ in range(frames // 1_000):
                self.socket.sendall(portion)
            self.socket.settimeout(0.2)
            return bool(self.socket.recv(1))
        except TimeoutError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self.socket.close()


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
