"""gRPC's asyncio server with a generic handler: no protobuf, a message a token. ``python -m … PORT``"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import msgspec
import uvloop

_RATE = float(os.environ.get("ECHO_TOKENS_PER_SECOND", "0"))
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_concurrent_streams", 20_000)]
_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode


async def generate(request: bytes, context: Any) -> AsyncIterator[bytes]:
    """The one method."""
    prompt, tokens = _unpack(request)
    messages = [_pack([word + " ", number]) for number, word in enumerate(prompt.split()[:64] or [""])]
    loop = asyncio.get_running_loop()
    tick = int(loop.time() * _RATE) + 1
    for position in range(tokens):
        if _RATE:
            await asyncio.sleep(max(0.0, (tick + position) / _RATE - loop.time()))
        yield messages[position % len(messages)]


async def main(port: str) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    handlers = {"Generate": grpc.unary_stream_rpc_method_handler(generate)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
