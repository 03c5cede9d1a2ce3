"""Record the conversations anew."""

from __future__ import annotations

import json
import socket
import tempfile

import msgspec
import zmq

from tests.recorded import FILE, ROLES, SAID, Conversation, Side
from zfabric.zmtp import z85

_PATIENCE_S = 10


def main() -> None:
    """Write the file."""
    made = {
        f"{role} {'curve' if guarded else 'null'}": msgspec.to_builtins(_record(Side(role, guarded), guarded))
        for role in ROLES
        for guarded in (False, True)
    }
    FILE.write_text(json.dumps({"libzmq": zmq.zmq_version(), "conversations": made}, indent=1) + "\n")


def _record(side: Side, guarded: bool) -> Conversation:
    with tempfile.TemporaryDirectory(prefix="zf-") as directory, zmq.Context() as context:
        theirs = context.socket(zmq.ROUTER if side.other == "router" else zmq.DEALER)
        theirs.linger = 0
        if guarded:
            theirs.curve_publickey, theirs.curve_secretkey = (z85.encode(key) for key in side.theirs)
            if side.other == "router":
                theirs.curve_server = True
            else:
                theirs.curve_serverkey = z85.encode(side.own[0])
        wire = _connected(theirs, f"{directory}/c")
        try:
            return _converse(side, theirs, wire)
        finally:
            wire.close()
            theirs.close()


def _connected(theirs: zmq.Socket[bytes], path: str) -> socket.socket:
    """Our end of a connection with libzmq's socket."""
    if theirs.socket_type == zmq.ROUTER:
        theirs.bind(f"ipc://{path}")
        wire = socket.socket(socket.AF_UNIX)
        wire.connect(path)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            theirs.connect(f"ipc://{path}")
            wire, _ = listener.accept()
    wire.settimeout(_PATIENCE_S)
    return wire


def _converse(side: Side, theirs: zmq.Socket[bytes], wire: socket.socket) -> Conversation:
    connection = side.connection
    pieces: list[tuple[bool, bytes]] = []
    while True:
        ours = connection.take_output()
        if ours:
            pieces.append((False, ours))
            wire.sendall(ours)
        if connection.ready:
            break
        heard = wire.recv(4_096)
        pieces.append((True, heard))
        connection.feed(heard)
        connection.next_event()
    words = side.words()
    wire.sendall(words)
    name: list[bytes] = []
    for frames in SAID[side.role]:
        heard_there = theirs.recv_multipart()
        # A ROUTER puts the peer's name before what it hears, and wants it before what it says.
        name = heard_there[: len(heard_there) - len(frames)]
        assert heard_there[len(name) :] == frames, "libzmq heard something else"
    for frames in SAID[side.other]:
        theirs.send_multipart([*name, *frames])
    received, count = b"", 0
    while count < len(SAID[side.other]):
        heard = wire.recv(65_536)
        received += heard
        connection.feed(heard)
        while (event := connection.next_event()) is not None:
            assert event == SAID[side.other][count], "libzmq said something else"
            count += 1
    return Conversation([(who, said.hex()) for who, said in _joined(pieces)], words.hex(), received.hex())


def _joined(pieces: list[tuple[bool, bytes]]) -> list[tuple[bool, bytes]]:
    """What one side said in a row, as one piece: how it was cut is the kernel's."""
    joined: list[tuple[bool, bytes]] = []
    for who, said in pieces:
        if joined and joined[-1][0] == who:
            joined[-1] = (who, joined[-1][1] + said)
        else:
            joined.append((who, said))
    return joined


if __name__ == "__main__":
    main()
