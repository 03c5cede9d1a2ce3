"""Doors that take bytes and remember nothing: the wire's decoders, ZMTP, and what comes over HTTP."""

from __future__ import annotations

import contextlib
import random
from typing import Any, Final

import msgspec

from zfabric.backends.hf_api.answers import AnswerReader
from zfabric.backends.hf_api.events import EventReader
from zfabric.backends.hf_api.models_file import Upstream
from zfabric.core.worker import soundness
from zfabric.errors import FabricError, ProtocolError
from zfabric.wire import codec, kinds
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.sampling import SamplingParams
from zfabric.zmtp import boxes
from zfabric.zmtp.connection import Connection
from zfabric.zmtp.curve import CurveServer
from zfabric.zmtp.faults import ZmtpError
from zfabric.zmtp.frames import Bounds
from zfabric.zmtp.metadata import ROUTER
from zfabric.zmtp.null import Null

BOUNDS: Final = Bounds(frame_bytes=20_000, message_frames=3, message_bytes=30_000, command_bytes=600)
OPERATIONS: Final = (
    "generate", "embed", "count_tokens", "tokenize", "detokenize", "score", "classify", "operate", "embed_tokens", "reward",
)  # fmt: skip
_SERVER_KEYS: Final = boxes.key_pair(random.Random(1).randbytes)


def zmtp_null(data: bytes) -> None:
    """Bytes of a peer without keys. The first byte says how the rest is cut."""
    feed(Connection(Null(ROUTER), BOUNDS), data)


def zmtp_curve(data: bytes) -> None:
    """Bytes of a peer with keys."""
    feed(Connection(CurveServer(ROUTER, *_SERVER_KEYS, lambda _: True, random.Random(2).randbytes), BOUNDS), data)


def feed(connection: Connection, data: bytes) -> None:
    """Bytes of the other end, which break the protocol or do not. The first byte says how the rest is cut."""
    step = max(1, data[0]) if data else 1
    with contextlib.suppress(ZmtpError):
        for place in range(1, len(data), step):
            connection.feed(data[place : place + step])
            take_events(connection)
            connection.take_output()


def take_events(connection: Connection) -> None:
    """All that has happened. Raises: ZmtpError. AssertionError: A message is larger than it may be."""
    while (event := connection.next_event()) is not None:
        if isinstance(event, list):
            assert len(event) <= BOUNDS.message_frames
            assert sum(map(len, event)) <= BOUNDS.message_bytes


def wire(data: bytes) -> None:
    """The header of any message."""
    if not data:
        return
    with contextlib.suppress(FabricError):
        if data[0] in (kinds.CLIENT_HELLO, kinds.WORKER_HELLO):
            codec.unpack_hello(data)
        elif data[0] == kinds.CHUNKS:
            rows = list(codec.unpack_chunks(data).rows())
            _same(codec.pack_chunks(7, rows)[0], rows)
        elif data[0] in kinds.WITH_BODY:
            _comes_back(codec.unpack_envelope(data))
        else:
            _comes_back(codec.unpack_control(data))
    codec.subject_of(data)
    with contextlib.suppress(ProtocolError):
        codec.unpack_ends_body(data)


def _comes_back(message: msgspec.Struct) -> None:
    """What decodes can be said again, and reads alike."""
    again = codec.encode(message)
    assert codec.encode(msgspec.msgpack.decode(again, type=type(message))) == again


def _same(header: bytes, rows: list[Any]) -> None:
    assert codec.encode(codec.unpack_chunks(header).rows()) == codec.encode(rows)


def requests(data: bytes) -> None:
    """The body of a SUBMIT. The first byte says of which operation."""
    operation = OPERATIONS[data[0] % len(OPERATIONS)] if data else "generate"
    with contextlib.suppress(FabricError):
        request = codec.unpack_request(operation, data[1:])
        request.validate()
        _comes_back(request)


_UPSTREAMS: Final = tuple(
    Upstream(name="m", base_url="http://127.0.0.1/v1", protocol=protocol) for protocol in ("chat", "completions", "tgi")
)
_ASKED: Final = GenerateRequest(
    prompt="x", request_id="r", sampling=SamplingParams(n=2, logprobs=1, stop=("stop",), max_new_tokens=None)
)


def upstream(data: bytes) -> None:
    """The stream of an upstream. The first two bytes say whose it is and how it is cut; however it is, the same events come."""
    whose, step = (data[0], max(1, data[1])) if len(data) > 1 else (0, 1)
    stream = data[2:]
    reader, whole = EventReader(limit=10_000), EventReader(limit=10_000)
    answer = AnswerReader(_UPSTREAMS[whose % len(_UPSTREAMS)], _ASKED)
    with contextlib.suppress(FabricError):
        found = [event for place in range(0, len(stream), step) for event in reader.feed(stream[place : place + step])]
        assert found == whole.feed(stream)
        for event in found:
            for delta in answer.take(event):
                _sound(delta)
    for delta in answer.finish(None):
        _sound(delta)


def _sound(delta: Delta) -> None:
    """Numbers are looked at by the worker; texts are whole characters already."""
    texts = [delta.text, delta.reasoning]
    texts += [text for call in delta.tool_calls or () for text in (call.id or "", call.name or "", call.arguments)]
    texts += [token.text for entry in delta.logprobs or () for token in (entry.token, *entry.top)]
    for text in texts:
        text.encode()
    with contextlib.suppress(FabricError):
        soundness.make_plain(delta)
        soundness.check_logprobs(delta)
        soundness.check_parts(delta)
