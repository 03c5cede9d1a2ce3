"""gRPC's asyncio client, messages packed by msgspec instead of protobuf: the cheaper of the two in Python."""

from __future__ import annotations

import grpc.aio
import msgspec

from bench.adapters import Arrived

_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


class RpcAdapter:
    """A server-streaming call an answer, on one channel."""

    async def open(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._call = self._channel.unary_stream("/echo.Echo/Generate")
        self._pack, self._unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
        await self._channel.channel_ready()

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        async for message in self._call(self._pack([prompt, tokens])):
            self._unpack(message)
            arrived(1)

    async def close(self) -> None:
        await self._channel.close()


make = RpcAdapter
