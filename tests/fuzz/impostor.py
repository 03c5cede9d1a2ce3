"""A hostile controller on a real socket: `python -m tests.fuzz.impostor --messages 20000`.

Clients and a worker of the library connect to it and do what they always do. What comes out of them is errors of the tree, and
in time; what they hold stays within a bound.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import psutil
from rich.console import Console

from tests.fuzz import recordings
from tests.fuzz.mutations import mutated
from tests.fuzz.sessions import welcome
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import FabricError
from zfabric.transport.loop_mechanisms import RouterConnections
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.chunks import EndsBody
from zfabric.wire.messages import End, Ends, Submit
from zfabric.wire.questions import Answer, Fault, Query
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService
from zfabric.zmtp.connection import Connection
from zfabric.zmtp.faults import ZmtpError
from zfabric.zmtp.frames import MORE, head

#: What a call is given to end in, and how much longer it may take on a loaded machine before it counts as hanging.
_DEADLINE_S: Final = 0.3
_PATIENCE_S: Final = 30
_GIGABYTE: Final = 2**30
#: Clients at a time.
_CLIENTS: Final = 8


class Impostor:
    """What listens as a controller does, and answers as none does.

    Args:
        rng: Chance.
        said: Counts what was sent.
    """

    def __init__(self, rng: random.Random, said: Counter[str]) -> None:
        self.rng = rng
        self.said = said
        self.endpoint = ""
        self._says = [frames for says in (recordings.controller_says, recordings.to_worker) for frames in says()]
        self._served: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Impostor]:
        """Be there, on a free port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            served = dict(self._served)
            for writer in served:
                writer.transport.abort()
            await asyncio.gather(*filter(None, served.values()))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._served[writer] = asyncio.current_task()
        with contextlib.suppress(OSError, EOFError, ZmtpError):
            try:
                await self._serve(reader, writer)
            finally:
                del self._served[writer]
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rng = self.rng
        if rng.random() < 0.15:
            self.said["broken handshakes"] += 1
            [data] = mutated(list(recordings.zmtp_streams()), rng.getrandbits(32), 1)
            writer.write(data)
            await writer.drain()
            return
        connection = RouterConnections(None).make()
        while not writer.is_closing():
            writer.write(connection.take_output())
            data = await reader.read(65_536)
            if not data:
                return
            connection.feed(data)
            while (event := connection.next_event()) is not None:
                if isinstance(event, list):
                    writer.write(b"".join(self._answers(connection, event)))
            await writer.drain()

    def _answers(self, connection: Connection, heard: list[bytes]) -> list[bytes]:
        """What is said to one message, as bytes."""
        rng = self.rng
        kind = heard[0][0]
        if kind in (kinds.CLIENT_HELLO, kinds.WORKER_HELLO) and rng.random() < 0.9:
            said = [codec.pack(welcome())]
        elif kind == kinds.SUBMIT:
            said = [self._to_request(codec.unpack_envelope(heard[0])) for _ in range(rng.randint(0, 4))]
        elif kind == kinds.QUERY and rng.random() < 0.7:
            query: Query = codec.unpack_control(heard[0])
            said = [codec.pack(Answer(number=query.number, code=rng.choice([0, 40_000]), result=codec.raw(7)))]
        else:
            said = []
        said += [self._anything() for _ in range(rng.choice([0, 1, 1, 3, 20]))]
        self.said["messages"] += len(said)
        written = [self._framed(connection, frames) for frames in said]
        if rng.random() < 0.02:
            self.said["messages without an end"] += 1
            written += [connection.encode(bytes(rng.choice([1, 60_000])), MORE) for _ in range(64)]
        if rng.random() < 0.02:
            self.said["a gigabyte announced"] += 1
            written.append(head(_GIGABYTE, 0) + bytes(100_000))
        return written

    def _anything(self) -> codec.Frames:
        """What a controller says to a client or a worker, of others' requests and wrong, now and then."""
        rng = self.rng
        header, body = rng.choice(self._says)
        if rng.random() < 0.4:
            [header] = mutated([header], rng.getrandbits(32), 1)
        if rng.random() < 0.2:
            body = rng.choice([b"", b"\x91" * 10_000, b"\xc6\x40\0\0\0", rng.randbytes(100)])
        return header or b"\0", body

    def _to_request(self, submit: Submit) -> codec.Frames:
        """About what was asked: in part right, and never all of it."""
        rng = self.rng
        number, attempt = submit.request, rng.choice([submit.attempt, submit.attempt, 7])
        chunk = Chunk(
            number, attempt, rng.choice([0, 0, 9]), rng.choice([0, 0, 1, 2**31]), "evil ", [1] * rng.choice([0, 1])
        )
        rich = ChunkExtra(finish_reason="stop", extra={"x": [1] * 50})
        end = End(request=number, attempt=attempt, code=rng.choice([0, 50301, 49901, 99_999]))
        ends = codec.pack_envelope(Ends(instance=7, ends=[end]))
        return rng.choice(
            [
                codec.pack_chunks(3, [chunk]),
                codec.pack_chunks(3, [msgspec.structs.replace(chunk, extra=rich)]),
                (ends, codec.encode(EndsBody(outcomes=[Outcome(units=rng.choice([0, 5]))]))),
                (ends, rng.choice([b"", b"\xc1", b"\x92\x90" * 5_000])),
                codec.pack(Fault(code=40_000, message="no", request=number, attempt=attempt)),
            ]
        )

    def _framed(self, connection: Connection, frames: codec.Frames) -> bytes:
        header, body = frames
        chance = self.rng.random()
        if chance < 0.05:
            return connection.encode(header) if body else connection.encode_pair(header, b"x")
        if not body and header[0] not in kinds.WITH_BODY:
            return connection.encode(header)
        return connection.encode_pair(header, body)


@dataclass
class Visit:
    """What became of those who connected.

    Attributes:
        said: What the impostor sent, and how often.
        calls: How calls of clients ended: by the name of the error, or "answered".
        worker_errors: What the worker ended with, each time that it was started anew.
        seconds: How long it took.
        grown: Bytes by which this process, which they are all in, has grown meanwhile.
    """

    said: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    worker_errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    grown: int = 0


async def run(messages: int, seed: int) -> Visit:
    """Have clients and a worker talk to an impostor until it has sent so many messages.

    Raises:
        AssertionError: Something else than an error of the tree came out.
        TimeoutError: A call hangs.
    """
    visit = Visit()
    process = psutil.Process()
    before, started = process.memory_info().rss, time.monotonic()
    async with Impostor(random.Random(seed), visit.said).listening() as impostor:
        working = asyncio.create_task(_work(impostor.endpoint, visit))
        while visit.said.total() < messages:
            async with asyncio.timeout(_PATIENCE_S):
                await asyncio.gather(*(_call(impostor.endpoint, visit) for _ in range(_CLIENTS)))
            if working.done():
                working.result()
        working.cancel()
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(working, return_exceptions=True)
    visit.seconds = time.monotonic() - started
    visit.grown = process.memory_info().rss - before
    return visit


async def _call(endpoint: str, visit: Visit) -> None:
    """One client, with a call of each sort at the same time."""
    async with AsyncClient(endpoint, connect_timeout_ms=int(_DEADLINE_S * 1_000)) as client:
        calls: tuple[Coroutine[Any, Any, object], ...] = (
            client.stream("m", "x", timeout=_DEADLINE_S).collect(),
            client.generate("m", "x", timeout=_DEADLINE_S, n=2),
            client.generate("m", "x", timeout=_DEADLINE_S, resume="never"),
            client.embed("m", "x", timeout=_DEADLINE_S),
            client.count_tokens("m", "x", timeout=_DEADLINE_S),
            client.operate("w", "call", timeout=_DEADLINE_S),
            client.status(timeout=_DEADLINE_S),
            client.models(timeout=_DEADLINE_S),
        )
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            is_error = isinstance(outcome, BaseException)
            assert not is_error or isinstance(outcome, FabricError), (
                f"a call raised what is no error of the tree: {outcome!r}"
            )
            visit.calls[type(outcome).__name__ if is_error else "answered"] += 1


async def _work(endpoint: str, visit: Visit) -> None:
    """A worker that comes back whenever it is sent away."""
    while True:
        worker = WorkerService(
            [EchoWorker(EchoOptions(model_names=("m",), tokens_per_second=1_000))],
            WorkerConfig(endpoint=endpoint, name="w"),
        )
        try:
            await worker.run()
        except FabricError as error:
            visit.worker_errors[type(error).__name__] += 1
        else:
            visit.worker_errors["left"] += 1


def main() -> int:
    """Be one until so many messages were sent."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.impostor", description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="that the impostor sends (20,000)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="of all that it says")
    given = parser.parse_args()
    console = Console()
    console.print(f"seed {given.seed}", highlight=False)
    visit = asyncio.run(run(given.messages, given.seed))
    console.print(f"{visit.said.total():,} messages in {visit.seconds:.0f} s, {visit.grown / 2**20:.1f} MiB more")
    for what in (visit.said, visit.calls, visit.worker_errors):
        console.print(dict(what), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
