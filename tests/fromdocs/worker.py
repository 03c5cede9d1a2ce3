"""A worker that counts: its answer to any prompt is "0 1 2 …". It runs on a thread of its own."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import zmq

from tests.fromdocs.connection import Connection
from tests.fromdocs.document import body_of, kind_of, message, named, packed, sampling_of, struct, unpacked, version

DRAINING, CANCELLED, LOST, WRONG = 50302, 49901, 50301, 40001
KEPT_S = 10.0


@dataclass
class Stream:
    """One attempt: token i is the number i, and its text says so."""

    dispatch: dict[str, Any]
    limit: int
    client: int | None
    window: int
    first: int
    made: int
    sent: int
    told: bool = False
    code: int | None = None
    message: str = ""
    result: Any = None
    finished_at: float = 0.0
    name: tuple[int, int, int] = field(default=(0, 0, 0))

    def chunk(self, until: int, worker: str) -> dict[str, Any]:
        """What is made from `sent` on, as an entry of each column."""
        tokens = list(range(self.sent, until))
        last = until == self.limit
        extra = None
        if self.sent == self.first or last:
            extra = struct(
                "ChunkExtra",
                worker=worker if self.sent == self.first else None,
                finish_reason="length" if last else None,
            )
        made = {
            "requests": self.dispatch["request"],
            "offsets": self.sent,
            "texts": "".join(f"{token} " for token in tokens),
            "tokens": tokens[0] if len(tokens) == 1 else tokens,
            "attempts": self.dispatch["attempt"],
            "extras": extra,
        }
        self.sent = until
        return made


def columns(chunks: list[dict[str, Any]]) -> list[Any]:
    """Chunks as columns."""
    made: dict[str, list[Any]] = {
        name: [chunk[name] for chunk in chunks] for name in ("requests", "offsets", "texts", "tokens")
    }
    if any(chunk["attempts"] for chunk in chunks):
        made["attempts"] = [chunk["attempts"] for chunk in chunks]
    made["extras"] = [[number, chunk["extras"]] for number, chunk in enumerate(chunks) if chunk["extras"] is not None]
    return struct("Chunks", **made)


class Worker:
    """Serves the model "counter" until it is drained or closed.

    Attributes:
        allowed: No stream is made further than this: what a test holds an engine back by.
    """

    def __init__(self, endpoint: str, name: str, *, slots: int = 4) -> None:
        self.name = name
        self.allowed = 1 << 30
        self.registered = threading.Event()
        self.aborted: list[tuple[int, int]] = []
        self.attempts: list[int] = []
        self.locks: list[bytes] = []
        self.refusals: list[int] = []
        self._endpoint, self._slots = endpoint, slots
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._instance = random.getrandbits(63)
        self._token = b""
        self._streams: dict[tuple[int, int, int], Stream] = {}
        self._session = False
        self._draining_until: float | None = None
        self._dispatches = 0
        self._beat_s = 1.0
        self._hello_at = self._beat_at = 0.0
        self._drop = self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.registered.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def started(self) -> Iterator[Self]:
        """As its block, without waiting for a session."""
        self._thread.start()
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """Leave."""
        self._stop = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def drop(self) -> None:
        """Lose the connection without a word, and make another."""
        self.registered.clear()
        self._drop = True

    def die(self) -> None:
        """End without a word."""
        self._drop = self._stop = True
        self._thread.join(20)

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        self._connection = Connection(self._context, self._endpoint)
        while not self._stop:
            frames = self._connection.receive(0.002)
            now = time.monotonic()
            if self._drop or self._connection.lost:
                self._drop = False
                self._lose()
                continue
            if frames is not None:
                self._receive(frames, now)
            if self._connection.up and not self._session and now >= self._hello_at:
                self._hello(now)
            if self._session:
                self._step(now)
            if self._draining_until is not None and (now >= self._draining_until or not self._running()):
                break
        if not self._drop:
            self._leave()
        self._connection.close()
        self._context.term()

    def _lose(self) -> None:
        self._connection.socket.linger = 0
        self._connection.close()
        self._over(0.0)
        self._connection = Connection(self._context, self._endpoint)

    def _over(self, pause_s: float) -> None:
        """The session is over: nobody is known to read any more."""
        self._session = False
        self._hello_at = time.monotonic() + pause_s
        for stream in self._streams.values():
            stream.client = None

    def _leave(self) -> None:
        for stream in self._running():
            self._finish(stream, DRAINING, "the worker leaves")
        self._flush()
        self._connection.send(message("GOODBYE", struct("Goodbye", reason="done")))

    def _running(self) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.code is None]

    # ── the session ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _hello(self, now: float) -> None:
        self._hello_at = now + random.uniform(0.75, 1.25)
        model = struct("ModelInfo", name="counter", capabilities=["generate", "resume", "count_tokens"])
        hello = struct(
            "WorkerHello",
            version=version(),
            build="fromdocs",
            name=self.name,
            instance=self._instance,
            models=[model],
            load=self._load(),
            token=self._token,
            carried=[self._carried(stream) for stream in self._streams.values()],
        )
        self._connection.send(message("WORKER_HELLO", hello))

    def _load(self) -> list[Any]:
        return struct(
            "Load",
            running=len(self._running()),
            slots=self._slots,
            dispatches=self._dispatches,
            draining=self._draining_until is not None,
            progress=sum(stream.made for stream in self._streams.values()),
        )

    def _carried(self, stream: Stream) -> list[Any]:
        same = ("instance", "request", "attempt", "operation", "model", "lock")
        values = {name: stream.dispatch[name] for name in same}
        return struct("Carried", finished=stream.code is not None, **values)

    def _report(self) -> None:
        self._connection.send(message("LOAD", self._load()))

    # ── the engine ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, now: float) -> None:
        if now >= self._beat_at:
            self._beat_at = now + self._beat_s
            self._report()
        for stream in self._running():
            if stream.made < min(stream.limit, self.allowed):
                stream.made += 1
            if stream.made >= stream.limit:
                self._finish(stream, 0)
        self._flush()
        for name in [name for name, stream in self._streams.items() if stream.code is not None]:
            if now - self._streams[name].finished_at > KEPT_S:
                del self._streams[name]

    def _finish(self, stream: Stream, code: int, text: str = "", result: Any = None) -> None:
        stream.code, stream.message, stream.result = code, text, result
        stream.finished_at = time.monotonic()

    def _flush(self) -> None:
        """What a step has made: one message of chunks for each client, and one of terminals."""
        chunks: dict[int, list[dict[str, Any]]] = {}
        ended: dict[tuple[int, int], list[Stream]] = {}
        for stream in self._streams.values():
            if stream.client is None or stream.told:
                continue
            if stream.code is not None:
                ended.setdefault((stream.dispatch["instance"], stream.client), []).append(stream)
                stream.told = True
            elif stream.sent < min(stream.made, stream.window):
                made = stream.chunk(min(stream.made, stream.window), self.name)
                chunks.setdefault(stream.client, []).append(made)
        for client, lines in chunks.items():
            self._connection.send(message("CHUNKS") + client.to_bytes(4, "big") + packed(columns(lines)))
        for (instance, client), streams in ended.items():
            self._end(instance, client, streams)

    def _end(self, instance: int, client: int, streams: list[Stream]) -> None:
        """Terminals bring along what is left, whatever the window is."""
        chunks = [stream.chunk(stream.made, self.name) for stream in streams if stream.sent < stream.made]
        ends = [
            struct("End", request=stream.dispatch["request"], attempt=stream.dispatch["attempt"], code=stream.code or 0)
            for stream in streams
        ]
        outcomes = [
            struct(
                "Outcome",
                units=stream.made,
                usage=struct("Usage", prompt_tokens=1, completion_tokens=stream.made),
                message=stream.message,
                result=stream.result,
            )
            for stream in streams
        ]
        envelope = message("ENDS", struct("Ends", instance=instance, ends=ends, client=client))
        self._connection.send(envelope, packed(struct("EndsBody", chunks=columns(chunks), outcomes=outcomes)))

    def _tell(self, instance: int, request: int, attempt: int, code: int, text: str) -> None:
        """A terminal of which nothing else is known."""
        ends = [struct("End", request=request, attempt=attempt, code=code)]
        body = struct("EndsBody", outcomes=[struct("Outcome", message=text)])
        self._connection.send(message("ENDS", struct("Ends", instance=instance, ends=ends)), packed(body))

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _receive(self, frames: list[bytes], now: float) -> None:
        kind = kind_of(frames[0])
        content = unpacked(frames[0][1:]) if len(frames[0]) > 1 else []
        if kind == "WELCOME":
            self._welcomed(named("Welcome", content), now)
        elif kind == "DRAIN":
            limit_s = named("Drain", content)["limit_ms"] / 1_000 or 30.0
            until = now + limit_s
            self._draining_until = min(self._draining_until or until, until)
            self._report()
        elif kind in ("UNKNOWN_SESSION", "GOODBYE", "REFUSED"):
            if kind == "REFUSED":
                self.refusals.append(named("Fault", content)["code"])
            if self._session:
                self._over(random.uniform(0, 0.1) if kind == "UNKNOWN_SESSION" else 1.0)
        elif self._session:
            self._in_session(kind, content, frames)

    def _welcomed(self, welcome: dict[str, Any], now: float) -> None:
        if self._session:
            return
        self._session = True
        self._token, self._beat_s = welcome["token"], welcome["beat_ms"] / 1_000
        self._beat_at = now + random.random() * self._beat_s
        self._dispatches = 0
        for stream in self._streams.values():
            stream.finished_at = now
        self.registered.set()

    def _in_session(self, kind: str, content: list[Any], frames: list[bytes]) -> None:
        if kind == "DISPATCH":
            self._dispatches += 1
            self._dispatched(named("Dispatch", content), frames[1])
        elif kind == "GRANT":
            grant = named("Grant", content)
            for line in grant["lines"]:
                self._granted(grant, named("CreditLine", line))
        elif kind == "ABORT":
            abort = named("Abort", content)
            for request, attempt in abort["attempts"]:
                self.aborted.append((request, attempt))
                self._streams.pop((abort["instance"], request, attempt), None)
                self._tell(abort["instance"], request, attempt, CANCELLED, "cancelled")
        elif kind == "BEAT" and not named("Beat", content)["number"]:
            self._report()

    def _dispatched(self, dispatch: dict[str, Any], body: bytes) -> None:
        name = (dispatch["instance"], dispatch["request"], dispatch["attempt"])
        known = self._streams.get(name)
        if known is not None:
            if known.code is not None:
                self._send_again(known, dispatch["client"], dispatch["resume_from"])
            return
        self.attempts.append(dispatch["attempt"])
        self.locks.append(dispatch["lock"])
        start = dispatch["resume_from"]
        stream = Stream(
            dispatch, 0, dispatch["client"], dispatch["window"], first=start, made=start, sent=start, name=name
        )
        self._streams[name] = stream
        if self._draining_until is not None:
            self._finish(stream, DRAINING, "the worker drains")
            return
        try:
            self._begin(stream, unpacked(body))
        except (ValueError, AssertionError) as error:
            self._finish(stream, WRONG, f"the request does not decode: {error}")

    def _begin(self, stream: Stream, body: Any) -> None:
        if stream.dispatch["operation"] == "count_tokens":
            prompt = named(body_of("count_tokens"), body)["prompt"]
            self._finish(stream, 0, result=len(prompt.split()))
            return
        request = named(body_of("generate"), body)
        assert len(request["resume_token_ids"]) == stream.first, "tokens and units differ"
        stream.limit = named(sampling_of("generate"), request["sampling"])["max_new_tokens"] or 256

    def _granted(self, grant: dict[str, Any], line: dict[str, Any]) -> None:
        stream = self._streams.get((grant["instance"], line["request"], line["attempt"]))
        if stream is not None:
            stream.window = max(stream.window, line["window"])
            if line["again"]:
                self._send_again(stream, grant["client"], line["next"])
        elif line["again"]:
            self._tell(grant["instance"], line["request"], line["attempt"], LOST, "it is not here any more")

    def _send_again(self, stream: Stream, client: int, units: int) -> None:
        stream.client, stream.sent, stream.told = client, units, False
