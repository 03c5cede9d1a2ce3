"""A worker session without a clock or a socket: what the controller says goes in, what the worker says is read."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from zfabric.core.worker.session import Begin, Order, WorkerSession
from zfabric.limits import FRAME_BYTES_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, Outcome
from zfabric.wire.flow import Abort, CreditLine, Grant
from zfabric.wire.messages import Dispatch, End, ModelInfo, Welcome
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.sampling import SamplingParams

CLIENT, INSTANCE = 7, 9


class Heard(NamedTuple):
    """What one flush said to a client."""

    chunks: list[Chunk]
    ends: list[End]
    outcomes: list[Outcome]
    frames: list[codec.Frames]


class WorkerSide:
    """A registered worker session, and the other end of its link."""

    def __init__(self, *, frame_bytes_max: int = FRAME_BYTES_MAX, minor: int = 0, **settings: Any) -> None:
        self.minor = minor
        self.session = WorkerSession(name="w", instance=1, rng=random.Random(1), **settings)
        self.session.announce([ModelInfo(name="m")], 0)
        self.frame_bytes_max = frame_bytes_max
        self.session.connected(0)
        self.welcome()

    def welcome(self) -> None:
        self.session.outbox.clear()
        message = Welcome(
            version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=1, token=b"t", beat_ms=1_000, lease_ms=3_000,
            frame_bytes_max=self.frame_bytes_max, minor=self.minor,
        )  # fmt: skip
        self.session.receive(*codec.pack(message), 0)

    def reconnect(self, now_ns: int = 0) -> None:
        """A controller that knows nothing: the session is over, and begins anew."""
        self.session.disconnected()
        self.session.connected(now_ns)
        self.session.tick(now_ns + 10**9)
        self.hello = codec.unpack_control(self.session.outbox[-1][0])
        self.welcome()

    def dispatch(self, request: int, body: bytes | None = None, **fields: Any) -> list[Order]:
        """Have a request begun. Choices go into the body, other fields into the envelope."""
        sampling = SamplingParams(n=fields.pop("n", 1))
        known = {
            "client": CLIENT, "instance": INSTANCE, "request": request, "attempt": 0, "operation": "generate",
            "model": "m", "window": 1_024,
        }  # fmt: skip
        envelope = Dispatch(**{**known, **fields})
        content = codec.encode(GenerateRequest(prompt="x", sampling=sampling)) if body is None else body
        return list(self.session.receive(codec.pack_envelope(envelope), content, 0))

    def begin(self, request: int, **fields: Any) -> str:
        """As `dispatch`. Returns the request's name."""
        (order,) = self.dispatch(request, **fields)
        assert isinstance(order, Begin)
        return order.request_id

    def emit(self, *step: tuple[str, Delta]) -> list[Order]:
        """One step of the engine, flushed."""
        return [*self.session.emit(step, 1), *self.session.flush()]

    def grant(self, request: int, units: int, window: int, *, again: bool = False, client: int = CLIENT) -> list[Order]:
        line = CreditLine(request=request, attempt=0, next=units, window=window, again=again)
        return list(self.session.receive(*codec.pack(Grant(client=client, instance=INSTANCE, lines=[line])), 0))

    def abort(self, request: int, attempt: int = 0) -> list[Order]:
        message = Abort(instance=INSTANCE, attempts=[(request, attempt)])
        return list(self.session.receive(*codec.pack(message), 0))

    def heard(self) -> Heard:
        """What a client reads of all that the worker has said since the last look. Each frame decodes as a whole."""
        frames, self.session.outbox = self.session.outbox, []
        heard = Heard([], [], [], [])
        for header, body in frames:
            if header[0] == kinds.CHUNKS:
                heard.frames.append((header, body))
                heard.chunks.extend(codec.unpack_chunks(header).rows())
            elif header[0] == kinds.ENDS:
                heard.frames.append((header, body))
                content = codec.unpack_ends_body(body)
                envelope = codec.unpack_envelope(header)
                assert len(envelope.ends) == len(content.outcomes)
                heard.chunks.extend(content.chunks.rows())
                heard.ends.extend(envelope.ends)
                heard.outcomes.extend(content.outcomes)
        assert all(len(part) <= self.frame_bytes_max for frame in heard.frames for part in frame)
        return heard


def token(number: int = 1, text: str = "t ", **fields: Any) -> Delta:
    """A delta of one token."""
    return Delta(text=text, token_ids=[number], **fields)


def last(number: int = 1, text: str = "t ", **fields: Any) -> Delta:
    """A delta that ends its choice."""
    return token(number, text, finish_reason="stop", **fields)
