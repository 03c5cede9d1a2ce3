"""The whole protocol from a client's side, with nothing but pyzmq and msgpack.

docs/protocol.md has the kinds, docs/protocol/messages.md the fields, docs/protocol/behaviour.md what a client owes. This one
does not go on elsewhere when its worker or its connection is lost.

python examples/minimal_client.py ENDPOINT MODEL "a prompt" [MAX_NEW_TOKENS]
"""

from __future__ import annotations

import random
import sys
from typing import Any

import msgpack
import zmq

CHUNKS, ENDS, SUBMIT, HELLO, WELCOME, CREDIT, FAULT = 0x01, 0x10, 0x11, 0x20, 0x22, 0x29, 0x2E
PROTOCOL_VERSION = 2
WINDOW = 1_024


def pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value))


def main() -> int:
    endpoint, model, prompt = sys.argv[1:4]
    limit = int(sys.argv[4]) if len(sys.argv) > 4 else 16

    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)

    # A session begins with HELLO = [version, build, instance], answered by WELCOME.
    instance = random.getrandbits(63)
    socket.send(bytes([HELLO]) + pack([PROTOCOL_VERSION, "minimal", instance]))
    answer = socket.recv()
    if answer[0] != WELCOME:
        print("refused:", msgpack.unpackb(answer[1:]), file=sys.stderr)
        return 1

    # SUBMIT has two frames. Its envelope is [request, attempt, operation, model, priority, deadline_ms, window].
    # Its body is [prompt, messages, prompt_token_ids, sampling]; sampling's 9th field is the limit.
    request = random.getrandbits(63)
    sampling = [1.0, 1.0, -1, 0.0, 1.0, 1.0, 0.0, 0.0, limit]
    envelope = pack([request, 0, "generate", model, 0, None, WINDOW])
    socket.send_multipart([bytes([SUBMIT]) + envelope, pack([prompt, None, None, sampling])])

    units, window = 0, WINDOW
    while True:
        header, *body = socket.recv_multipart()
        if header[0] == CHUNKS:
            chunks, outcomes = msgpack.unpackb(header[5:]), []
        elif header[0] == ENDS:
            chunks, outcomes, *_ = msgpack.unpackb(body[0])
        elif header[0] == FAULT:
            # The controller could not use what was sent, so nothing else will come.
            print("fault:", msgpack.unpackb(header[1:]), file=sys.stderr)
            return 1
        else:
            continue
        # Elements beyond those that one knows are ignored. Chunks are columns: [requests, offsets, texts, tokens,
        # attempts, indexes, extras]. One token stands for itself; extras are pairs of a chunk's number and its extra.
        requests, offsets, texts, tokens, _attempts, _indexes, extras, *_ = chunks or [[], [], [], [], [], [], []]
        units_of = {number: extra[0] for number, extra in extras}
        for number, (owner, offset, text, new) in enumerate(zip(requests, offsets, texts, tokens, strict=True)):
            if owner == request and offset == units:
                units += units_of.get(number) or (1 if isinstance(new, int) else len(new) or 1)
                print(text, end="", flush=True)
        # The envelope of ENDS is [instance, [[request, attempt, code], …]], one outcome for each in the body.
        if header[0] == ENDS:
            _, ends, *_ = msgpack.unpackb(header[1:])
            for (owner, _attempt, code, *_), outcome in zip(ends, outcomes, strict=True):
                if owner == request:
                    print()
                    if code:
                        print(f"error {code}: {outcome[2]}", file=sys.stderr)
                    return 1 if code else 0
        # More credit before the window is used up.
        if window - units < WINDOW // 2:
            window = units + WINDOW
            socket.send(bytes([CREDIT]) + pack([[[request, 0, units, window]]]))


if __name__ == "__main__":
    raise SystemExit(main())
