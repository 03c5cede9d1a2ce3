"""Hostile peers on real sockets, in a process of their own: `python -m tests.fuzz.attackers ENDPOINT …`.

What each connection says is drawn by the seed and the connection's number. What it has overheard of the others stands in a
file, which the fabric's side writes anew while it runs: instances, numbers of requests, names of workers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.fuzz import recordings
from tests.fuzz.mutations import mutated
from zfabric.limits import FRAME_BYTES_MAX, MESSAGE_FRAMES_MAX
from zfabric.testing.grammar import Gossip, Grammar
from zfabric.transport.curve import Credentials
from zfabric.transport.endpoints import parse_endpoint
from zfabric.transport.loop_mechanisms import DealerConnections
from zfabric.wire import codec, kinds
from zfabric.wire.messages import Submit
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams
from zfabric.zmtp.connection import GREETING_BYTES, Connection
from zfabric.zmtp.faults import ZmtpError
from zfabric.zmtp.frames import MORE, head

#: Messages of one connection, at most.
_MESSAGES_MAX: Final = 80
_GIGABYTE: Final = 2**30
#: The longest that a connection takes: a peer that is not answered goes its way.
_PATIENCE_S: Final = 10
#: Heads of MessagePack that announce a gigabyte: binary, text, list, map.
_HEADS: Final = tuple(bytes([mark]) + _GIGABYTE.to_bytes(4, "big") for mark in (0xC6, 0xDB, 0xDD, 0xDF))


class Target(NamedTuple):
    """Whom to attack, and what is known of them.

    Attributes:
        endpoint: The controller's.
        gossip: A file of `{"attempts": [[instance, request, attempt] …], "sessions": …, "workers": …}`.
        model: One that is served to others, and that this peer may ask for.
        as_client, as_worker: Keys that allow little; None where the fabric has none.
    """

    endpoint: str
    gossip: Path
    model: str
    as_client: Credentials | None = None
    as_worker: Credentials | None = None


async def connect(endpoint: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection. Raises: OSError."""
    place = parse_endpoint(endpoint)
    if place.is_ipc:
        return await asyncio.open_unix_connection(place.path)
    return await asyncio.open_connection(place.host, place.port)


class Attacker:
    """One connection, with what it says.

    Args:
        number: Of the connection; with the seed it says what chance it has.
        said: Counts what was sent.
    """

    def __init__(self, target: Target, seed: int, number: int, said: Counter[str]) -> None:
        self.target = target
        self.rng = random.Random(f"{seed}-{number}")
        self.said = said
        self.grammar = Grammar(self.rng, Gossip(**json.loads(target.gossip.read_text())))
        self.instance = self.rng.getrandbits(63)
        self._connection: Connection | None = None
        self._written: list[bytes] = []

    async def run(self) -> None:
        """Say it all. What ends the connection ends this."""
        acts: dict[Callable[[], Coroutine[Any, Any, None]], int] = {
            self._as_client: 6, self._as_worker: 5, self._as_nobody: 2, self._garbled: 2, self._without_end: 1,
            self._announce_much: 1, self._nested: 1,
        }  # fmt: skip
        [act] = self.rng.choices(list(acts), list(acts.values()))
        with contextlib.suppress(OSError, EOFError, ZmtpError, TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                self.reader, self.writer = await connect(self.target.endpoint)
                try:
                    await act()
                finally:
                    self.writer.transport.abort()

    # ── who it is ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _as_client(self) -> None:
        await self._introduce(self.target.as_client)
        # Under another's number now and then, which stands in the log of any worker.
        instance = self.grammar.attempt()[0] if self.rng.random() < 0.3 else self.instance
        self._say("a client's", self.grammar.client_hello(instance, b""))
        await self._talk(self._client_words, self._worker_words)

    async def _as_worker(self) -> None:
        await self._introduce(self.target.as_worker)
        name = self.rng.choice(["evil-0", "evil-1", *self.grammar.gossip.workers])
        has_keys = self.target.as_worker is not None
        self._say("a worker's", self.grammar.worker_hello(name, self.instance, b"", collide=has_keys))
        await self._talk(self._worker_words, self._client_words)

    async def _as_nobody(self) -> None:
        await self._introduce(self.rng.choice([self.target.as_client, self.target.as_worker]))
        await self._talk(self._client_words, self._worker_words)

    async def _introduce(self, credentials: Credentials | None) -> None:
        """ZMTP's handshake. Raises: ZmtpError, OSError."""
        connection = DealerConnections(credentials).make()
        while not connection.ready:
            self.writer.write(connection.take_output())
            data = await self.reader.read(65_536)
            if not data:
                raise EOFError
            connection.feed(data)
            while connection.next_event() is not None:
                pass
        self.writer.write(connection.take_output())
        self._connection = connection

    async def _talk(self, own: Callable[[], codec.Frames], others: Callable[[], codec.Frames]) -> None:
        """Send a number of messages, while what comes is read, or is not."""
        deaf = self.rng.random() < 0.1
        reading = None if deaf else asyncio.create_task(self._read())
        try:
            for _ in range(self.rng.randint(1, _MESSAGES_MAX)):
                chance = self.rng.random()
                if chance < 0.65:
                    self._say("in any order", own())
                elif chance < 0.75:
                    self._say("of another role", others())
                elif chance < 0.9:
                    self._say("with wrong bytes", self._wrong(own()))
                else:
                    self._say("of a wrong number of frames", self._misframed(own()))
                await self._flush()
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _read(self) -> None:
        while await self.reader.read(65_536):
            pass

    # ── what it says ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _client_words(self) -> codec.Frames:
        grammar = self.grammar
        hello = lambda: grammar.client_hello(self.instance, b"")  # noqa: E731 — one of several
        query = lambda: grammar.query(self.rng.randint(1, 9))  # noqa: E731
        words = (
            self._submit, self._submit, grammar.submit, grammar.submit, grammar.claims, grammar.cancel, grammar.credit, hello,
            query, grammar.beat,
        )  # fmt: skip
        return self.rng.choice(words)()

    def _submit(self) -> codec.Frames:
        """A request that is served, under its own number or another's."""
        rng = self.rng
        submit = Submit(
            request=self.grammar.request(),
            attempt=rng.choice([0, 0, 1]),
            operation="generate",
            model=self.target.model,
            priority=rng.choice([0, -1_000, 1_000]),
            window=rng.choice([0, 1, 1_024]),
            deadline_ms=rng.choice([None, 1, 500]),
        )
        sampling = SamplingParams(max_new_tokens=rng.randint(1, 20))
        return codec.pack_envelope(submit), codec.encode(GenerateRequest(prompt="evil words", sampling=sampling))

    def _worker_words(self) -> codec.Frames:
        grammar = self.grammar
        words = (
            grammar.ends,
            grammar.ends,
            grammar.chunks,
            grammar.chunks,
            grammar.carried,
            grammar.load,
            grammar.beat,
        )
        return self.rng.choice(words)()

    def _wrong(self, frames: codec.Frames) -> codec.Frames:
        header, body = frames
        [changed] = mutated([header], self.rng.getrandbits(32), 1)
        return changed or b"\0", body

    def _misframed(self, frames: codec.Frames) -> tuple[bytes, ...]:
        header, body = frames
        return self.rng.choice([(b"", header, body), (header, body, body), (body or b"x",), (header, b"", b"", b"")])

    def _say(self, what: str, frames: tuple[bytes, ...]) -> None:
        connection = self._connection
        assert connection is not None
        header, *rest = frames
        if len(frames) == 2 and (not header or header[0] not in kinds.WITH_BODY) and not rest[0]:
            rest = []
        bodies = [header, *rest]
        self._written += [connection.encode(body, MORE) for body in bodies[:-1]] + [connection.encode(bodies[-1])]
        self.said[what] += 1

    async def _flush(self) -> None:
        written, self._written = self._written, []
        self.writer.write(b"".join(written))
        await self.writer.drain()

    # ── what is no message ────────────────────────────────────────────────────────────────────────────────────────────

    async def _garbled(self) -> None:
        """Greetings and handshakes that are changed, cut off, or nothing of the kind."""
        rng = self.rng
        streams = [
            *recordings.zmtp_streams(),
            *recordings.curve_streams(),
            b"GET / HTTP/1.1\r\n\r\n" * 3,
            rng.randbytes(400),
        ]
        [data] = mutated(streams, rng.getrandbits(32), 1)
        self.said["broken handshakes"] += 1
        for place in range(0, len(data), step := rng.choice([1, 64, 4_096])):
            self.writer.write(data[place : place + step])
            await self.writer.drain()
            if place > GREETING_BYTES and step == 1:
                break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self._read()

    async def _without_end(self) -> None:
        """Frames that say that more of their message follow."""
        await self._introduce(self.target.as_client)
        if self.rng.random() < 0.5:
            self._say("a client's", self.grammar.client_hello(self.instance, b""))
        connection = self._connection
        assert connection is not None
        self.said["messages without an end"] += 1
        body = bytes(self.rng.choice([0, 1, 60_000]))
        for _ in range(MESSAGE_FRAMES_MAX * 8):
            self._written.append(connection.encode(body, MORE))
            await self._flush()
            if self.reader.at_eof():
                break

    async def _announce_much(self) -> None:
        """A gigabyte, as ZMTP's frame or in MessagePack, of which little comes."""
        await self._introduce(self.target.as_client)
        if self.rng.random() < 0.7:
            self._say("a client's", self.grammar.client_hello(self.instance, b""))
        if self.rng.random() < 0.5:
            for inner in _HEADS:
                self._say(
                    "a gigabyte announced", (bytes([self.rng.choice(list(kinds.NAMES))]) + b"\x91" + inner, inner)
                )
            await self._flush()
        self.said["a gigabyte announced"] += 1
        self.writer.write(head(self.rng.choice([_GIGABYTE, FRAME_BYTES_MAX, 2**62]), 0) + bytes(100_000))
        await self.writer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self._read()

    async def _nested(self) -> None:
        """Lists in lists, maps in maps, of every kind."""
        await self._introduce(self.target.as_client)
        self._say("a client's", self.grammar.client_hello(self.instance, b""))
        for kind in kinds.NAMES:
            deep = self.rng.choice([b"\x91", b"\x81\xa1x"]) * self.rng.choice([65, 4_000, 100_000])
            self._say("deeply nested", (bytes([kind]) + deep, deep))
            header, _ = self._submit()
            self._say("deeply nested", (header, b"\x91\xc0" + deep))
        await self._flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self._read()


async def attack(target: Target, seed: int, messages: int, together: int, half_open: int) -> Counter[str]:
    """Attack until so many messages have been sent.

    Args:
        together: Connections at a time.
        half_open: Connections beside them that say half a greeting and no more.
    """
    said: Counter[str] = Counter()
    numbers = iter(range(10**9))

    async def one() -> None:
        while said.total() - said["half-open connections"] < messages:
            await Attacker(target, seed, next(numbers), said).run()

    held = [asyncio.create_task(_hold(target.endpoint, number, said)) for number in range(half_open)]
    try:
        await asyncio.gather(*(one() for _ in range(together)))
    finally:
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
    return said


async def _hold(endpoint: str, number: int, said: Counter[str]) -> None:
    """Be half open until the other end has had enough, and then again."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await connect(endpoint)
            said["half-open connections"] += 1
            try:
                writer.write((b"\xff" + bytes(8) + b"\x7f\x03\x01NULL")[: number % 16])
                await reader.read()
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.1)


def main() -> None:
    """Attack, and print what was said as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("--gossip", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--half-open", type=int, default=0)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--keys", type=Path, help="directory with controller.key, user.key_secret and gpu.key_secret")
    given = parser.parse_args()
    keys = [None, None] if given.keys is None else [
        Credentials.load(given.keys / f"{name}.key_secret", given.keys / "controller.key") for name in ("user", "gpu")
    ]  # fmt: skip
    target = Target(given.endpoint, given.gossip, given.model, *keys)
    os.nice(given.nice)
    print(json.dumps(asyncio.run(attack(target, given.seed, given.messages, given.together, given.half_open))))


if __name__ == "__main__":
    main()
