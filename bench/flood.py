"""Peers that do nothing but send and receive messages as fast as they can, to load a relay and nothing else.

``python -m bench.flood send|receive MODE TARGET WORKERS CLIENTS``. MODE is ``fabric`` (real sessions at a controller, every
worker with a model of its own, every client and every worker with one request at least, then chunks) or ``proxy`` (the
same frames through `zmq_proxy`). The receiver gives an acknowledgement for each portion of messages, by the same way
back, so that a bounded number is on its way. The sender takes ``COUNT TOKENS`` lines from standard input, and answers
with the seconds that so many messages took, each with so many tokens.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import zmq

from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk
from zfabric.wire.chunks import columns_of
from zfabric.wire.flow import Credit, CreditLine
from zfabric.wire.load import Load
from zfabric.wire.messages import ClientHello, ModelInfo, Submit, WorkerHello
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

_PORTION = 128
_WINDOW = 8 * _PORTION
Socket = zmq.Socket[bytes]


def dealers(target: str, count: int) -> list[Socket]:
    """So many connections of one context."""
    context: zmq.Context[Socket] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 4_096)
    sockets = []
    for _ in range(count):
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.set_hwm(4_096)
        socket.connect(target)
        sockets.append(socket)
    return sockets


def expect(socket: Socket, kind: int) -> None:
    """Wait for a message of a kind; others are passed over. Raises: TimeoutError after 20 s."""
    while socket.poll(20_000):
        if socket.recv_multipart()[0][0] == kind:
            return
    raise TimeoutError(f"no {kinds.NAMES[kind]} came")


def say(socket: Socket, frames: codec.Frames) -> None:
    """One message, as the fabric frames it."""
    socket.send_multipart([frame for frame in frames if frame] or [b""])


class Sender:
    """The workers. A route is one request: a socket, the frames that lead to its client, its number."""

    def __init__(self, mode: str, target: str, workers: int, clients: int) -> None:
        self._sockets = dealers(target, workers)
        self._fabric = mode == "fabric"
        self._routes: list[tuple[Socket, list[bytes], int]] = []
        self._clients = clients
        if self._fabric:
            for number, socket in enumerate(self._sockets):
                info = ModelInfo(name=f"m{number}", capabilities=["generate"])
                hello = WorkerHello(
                    version=kinds.PROTOCOL_VERSION,
                    build="",
                    name=f"w{number}",
                    instance=number + 1,
                    models=[info],
                    load=Load(slots=20_000),
                    beats=False,
                )
                say(socket, codec.pack(hello))
                expect(socket, kinds.WELCOME)
        else:
            say(self._sockets[0], (b"", b""))

    def accept(self) -> None:
        """Take all requests: one of each client at each worker that serves its model."""
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        wanted = max(len(self._sockets), self._clients) if self._fabric else self._clients
        while len(self._routes) < wanted:
            for socket, _ in poller.poll(20_000):
                frames = socket.recv_multipart()
                if not self._fabric:
                    self._routes.append((socket, [frames[0], codec.chunks_route(0)], 0))
                elif frames[0][0] == kinds.DISPATCH:
                    order = codec.unpack_envelope(frames[0])
                    self._routes.append((socket, [codec.chunks_route(order.client)], order.request))
        if not self._fabric:
            # Any of its workers may send to any of the proxy's clients.
            known = [frames for _, frames, _ in self._routes]
            many = max(len(self._sockets), self._clients)
            self._routes = [(self._sockets[n % len(self._sockets)], known[n % len(known)], 0) for n in range(many)]
        self._poller = poller

    def flood(self, count: int, tokens: int) -> float:
        """Send so many messages over all routes in turn, and wait for the last acknowledgement. Returns seconds."""
        chunks = [columns_of([Chunk(request, 0, 0, 0, " token", [7])] * tokens) for _, _, request in self._routes]
        messages = [
            [*frames[:-1], frames[-1] + codec.encode(chunk)]
            for (_, frames, _), chunk in zip(self._routes, chunks, strict=True)
        ]
        sockets = [socket for socket, _, _ in self._routes]
        routes, sent, acknowledged = len(messages), 0, 0
        began = time.perf_counter()
        while acknowledged < count:
            while sent < count and sent - acknowledged < _WINDOW:
                *first, last = messages[sent % routes]
                send = sockets[sent % routes].send
                for frame in first:
                    send(frame, zmq.SNDMORE)
                send(last)
                sent += 1
            for socket, _ in self._poller.poll(20_000):
                frames = socket.recv_multipart()
                if not self._fabric or frames[0][0] == kinds.GRANT:
                    acknowledged += _PORTION
        return time.perf_counter() - began


class Receiver:
    """The clients. Portions are counted over all of them, so that few messages to each of many are enough."""

    def __init__(self, mode: str, target: str, workers: int, clients: int) -> None:
        self._sockets = dealers(target, clients)
        #: Of each client, its first request.
        self._numbers = {socket: number for number, socket in enumerate(self._sockets)}
        self._fabric = mode == "fabric"
        for number, socket in enumerate(self._sockets):
            if not self._fabric:
                say(socket, (b"", b""))
                continue
            say(socket, codec.pack(ClientHello(version=kinds.PROTOCOL_VERSION, build="", instance=number + 1)))
            expect(socket, kinds.WELCOME)
        body = codec.encode(GenerateRequest(prompt="x", sampling=SamplingParams()))
        for number in range(max(workers, clients) if self._fabric else 0):
            submit = Submit(request=number, attempt=0, operation="generate", model=f"m{number % workers}", window=1)
            say(self._sockets[number % clients], (codec.pack_envelope(submit), body))

    def run(self) -> None:
        """Count, and acknowledge each portion, for ever."""
        poller, got = zmq.Poller(), 0
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        chunks = kinds.CHUNKS
        while True:
            for socket, _ in poller.poll():
                number = self._numbers[socket]
                receive = socket.recv
                try:
                    for _ in range(256):
                        if receive(zmq.NOBLOCK)[0] != chunks:
                            continue
                        got += 1
                        if got % _PORTION == 0:
                            self._acknowledge(socket, number, got)
                except zmq.Again:
                    pass

    def _acknowledge(self, socket: Socket, number: int, got: int) -> None:
        say(
            socket,
            codec.pack(Credit([CreditLine(request=number, attempt=0, next=got, window=got)]))
            if self._fabric
            else (b"", b""),
        )


def main() -> None:
    role, mode, target, workers, clients = sys.argv[1:6]
    arguments: tuple[Any, ...] = (mode, target, int(workers), int(clients))
    if role == "receive":
        receiver = Receiver(*arguments)
        print("ready", flush=True)
        receiver.run()
        return
    sender = Sender(*arguments)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        count, tokens = map(int, line.split())
        if not number:
            sender.accept()
        print(sender.flood(count // _PORTION * _PORTION, tokens), flush=True)


if __name__ == "__main__":
    main()
