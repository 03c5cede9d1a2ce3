"""The least worker there is behind the C proxy: an event loop that answers each request with one token. ``… ENDPOINT``"""

from __future__ import annotations

import asyncio
import sys

import uvloop
import zmq

_TOKEN = b"\x93\x01\xa4the \x91\x00"


async def main(endpoint: str) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)
    receive, send = socket.recv, socket.send

    def read() -> None:
        try:
            while True:
                client, key = receive(zmq.NOBLOCK), receive(zmq.NOBLOCK)
                receive(zmq.NOBLOCK)
                send(client, zmq.SNDMORE | zmq.NOBLOCK)
                send(key, zmq.SNDMORE | zmq.NOBLOCK)
                send(_TOKEN, zmq.NOBLOCK)
        except zmq.Again:
            pass

    asyncio.get_running_loop().add_reader(int(socket.getsockopt(zmq.FD)), read)
    read()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
