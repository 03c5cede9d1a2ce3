"""libzmq's own relay: `zmq_proxy`, in C, between two sockets. ``python -m … FRONTEND BACKEND``"""

from __future__ import annotations

import sys

import zmq


def main(frontend_endpoint: str, backend_endpoint: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    frontend, backend = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket, endpoint in ((frontend, frontend_endpoint), (backend, backend_endpoint)):
        socket.set_hwm(4_096)
        socket.bind(endpoint)
    print("ready", flush=True)
    zmq.proxy(frontend, backend)


if __name__ == "__main__":
    main(*sys.argv[1:3])
