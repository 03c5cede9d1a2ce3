"""Nothing but ZeroMQ: a DEALER, an event loop, a future a request. What any client over the C proxy has to pay."""

from __future__ import annotations

import asyncio

import zmq

from bench.adapters import Arrived


class BareAdapter:
    """One-token requests alone: two frames there, two frames back."""

    async def open(self, target: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(target)
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._next = 0
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        receive = self._socket.recv
        try:
            while True:
                key = receive(zmq.NOBLOCK)
                self._waiting.pop(key).set_result(receive(zmq.NOBLOCK))
        except zmq.Again:
            pass

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        self._next += 1
        key = self._next.to_bytes(4, "little")
        future = self._waiting[key] = self._loop.create_future()
        self._socket.send(key, zmq.SNDMORE | zmq.NOBLOCK)
        self._socket.send(prompt.encode(), zmq.NOBLOCK)
        # The descriptor is edge-triggered: a send may have taken the edge of an answer.
        self._read()
        await future
        arrived(1)

    async def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close()


make = BareAdapter
