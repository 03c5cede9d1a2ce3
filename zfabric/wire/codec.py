"""Structs to bytes and back: one encoder, one decoder per kind, sizes checked before anything is decoded.

Every failure to decode is a ProtocolError, whatever the bytes: MessagePack that nests too deeply raises RecursionError
in the parser, and that is the sender's fault as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from zfabric.errors import FabricError, ProtocolError, VersionMismatchError
from zfabric.limits import ATTEMPTS_MAX, CONTROL_BODY_BYTES_MAX, HEADER_BYTES_MAX, MESSAGE_LENGTH_MAX
from zfabric.wire import answers, chunks, flow, kinds, load, messages, payloads, questions, tasks

T = TypeVar("T")

_encoder: Final = msgspec.msgpack.Encoder()
#: MessagePack of one value.
encode = _encoder.encode

_ENVELOPES: Final[dict[int, type[Struct]]] = {
    kinds.SUBMIT: messages.Submit,
    kinds.DISPATCH: messages.Dispatch,
    kinds.ENDS: messages.Ends,
}
_BODIES: Final[dict[int, type[Struct]]] = {
    kinds.CLIENT_HELLO: messages.ClientHello,
    kinds.WORKER_HELLO: messages.WorkerHello,
    kinds.WELCOME: messages.Welcome,
    kinds.REFUSED: questions.Fault,
    kinds.BEAT: messages.Beat,
    kinds.LOAD: load.Load,
    kinds.GOODBYE: messages.Goodbye,
    kinds.CANCEL: flow.Cancel,
    kinds.CREDIT: flow.Credit,
    kinds.GRANT: flow.Grant,
    kinds.ABORT: flow.Abort,
    kinds.QUERY: questions.Query,
    kinds.ANSWER: questions.Answer,
    kinds.FAULT: questions.Fault,
    kinds.DRAIN: messages.Drain,
    kinds.CLAIMS: messages.Claims,
    kinds.CARRIED: messages.CarriedMore,
    kinds.LOCATE: messages.Locate,
    kinds.LOCATED: messages.Located,
}
#: What follows the byte of a kind in the first frame.
STRUCTS: Final[dict[int, type[Struct]]] = {**_ENVELOPES, **_BODIES}
_KIND_OF: Final[dict[type[Struct], int]] = {
    kind_type: kind for kind, kind_type in STRUCTS.items() if kind != kinds.REFUSED
}
_HEADER_OF: Final = {kind: bytes([kind]) for kind in kinds.NAMES}
_envelope_decoders: Final = {kind: msgspec.msgpack.Decoder(t) for kind, t in _ENVELOPES.items()}
_body_decoders: Final = {kind: msgspec.msgpack.Decoder(t) for kind, t in _BODIES.items()}
_chunks_decoder: Final = msgspec.msgpack.Decoder(chunks.Chunks)
_ends_decoder: Final = msgspec.msgpack.Decoder(chunks.EndsBody)
_request_decoders: Final[dict[str, msgspec.msgpack.Decoder[Any]]] = {
    "generate": msgspec.msgpack.Decoder(payloads.TextRequest),
    "embed": msgspec.msgpack.Decoder(tasks.EmbedRequest),
    "count_tokens": msgspec.msgpack.Decoder(payloads.CountRequest),
    "tokenize": msgspec.msgpack.Decoder(payloads.CountRequest),
    "detokenize": msgspec.msgpack.Decoder(tasks.DetokenizeRequest),
    "score": msgspec.msgpack.Decoder(tasks.ScoreRequest),
    "classify": msgspec.msgpack.Decoder(tasks.ClassifyRequest),
    "embed_tokens": msgspec.msgpack.Decoder(tasks.EmbedTokensRequest),
    "reward": msgspec.msgpack.Decoder(tasks.RewardRequest),
    "operate": msgspec.msgpack.Decoder(payloads.OperateRequest),
}

#: The header frame and the body frame of one message. Only kinds in `kinds.WITH_BODY` have a body frame; for all others
#: the header frame is the whole message, and the body is EMPTY. A frame fewer is half a microsecond less at each hop.
Frames = tuple[bytes, bytes]

EMPTY: Final = b""


class Subject(NamedTuple):
    """What a message is about: an attempt of a request, a query, or nothing that has a name."""

    request: int | None = None
    attempt: int | None = None
    query: int | None = None


NO_SUBJECT: Final = Subject()

#: Bytes of a chunks message that say where it goes.
ROUTE_BYTES: Final = 5


def chunks_route(client: int) -> bytes:
    """How one client's chunks begin: the kind and the session's number."""
    return b"\x01" + client.to_bytes(4, "big")


def pack_chunks(client: int, rows: Iterable[answers.Chunk]) -> Frames:
    """CHUNKS for one client."""
    return chunks_route(client) + encode(chunks.columns_of(rows)), EMPTY


def pack(message: Struct) -> Frames:
    """A control message."""
    return _HEADER_OF[_KIND_OF[type(message)]] + encode(message), EMPTY


def pack_refused(error: FabricError) -> Frames:
    """REFUSED: no session, for this reason."""
    return _HEADER_OF[kinds.REFUSED] + encode(fault_of(error)), EMPTY


def pack_fault(error: FabricError, subject: Subject = NO_SUBJECT) -> Frames:
    """FAULT: this message could not be used; the session goes on. It ends its subject, if that is known."""
    fault = fault_of(error)
    fault.request, fault.attempt, fault.query = subject
    return _HEADER_OF[kinds.FAULT] + encode(fault), EMPTY


def pack_unknown_session() -> Frames:
    """UNKNOWN_SESSION: say HELLO first."""
    return _HEADER_OF[kinds.UNKNOWN_SESSION], EMPTY


def pack_envelope(envelope: messages.Submit | messages.Dispatch | messages.Ends) -> bytes:
    """The header of a passing message."""
    return _HEADER_OF[_KIND_OF[type(envelope)]] + encode(envelope)


def raw(value: object) -> msgspec.Raw:
    """A value encoded now, to be spliced into a message."""
    return msgspec.Raw(encode(value))


def fault_of(error: FabricError) -> questions.Fault:
    return questions.Fault(code=error.code, message=told(error), details=error.details)


def told(error: FabricError) -> str:
    """An error's message, cut to what the wire takes."""
    text = error.message
    return text if len(text) <= MESSAGE_LENGTH_MAX else f"{text[: MESSAGE_LENGTH_MAX - 1]}…"


def subject_of(header: bytes) -> Subject:
    """What a message was about, also where it does not decode: the numbers at its beginning, if they can be read.

    Returns:
        The attempt of a SUBMIT, or the number of a QUERY; NO_SUBJECT for all else.
    """
    kind = header[0] if header else -1
    if kind not in (kinds.SUBMIT, kinds.QUERY):
        return NO_SUBJECT
    numbers = leading_integers(memoryview(header)[1:], 2 if kind == kinds.SUBMIT else 1)
    if not numbers or numbers[0] >= 2**63:
        return NO_SUBJECT
    if kind == kinds.QUERY:
        return Subject(query=numbers[0])
    attempt = numbers[1] if len(numbers) > 1 and numbers[1] <= ATTEMPTS_MAX else 0
    return Subject(request=numbers[0], attempt=attempt)


def leading_integers(data: memoryview, count: int) -> list[int]:
    """Up to so many unsigned integers at the start of a MessagePack array, however broken the rest of it is."""
    found: list[int] = []
    if not len(data):
        return found
    position = 1 if data[0] & 0xF0 == 0x90 else {0xDC: 3, 0xDD: 5}.get(data[0], len(data))
    while len(found) < count and position < len(data):
        first = data[position]
        if first < 0x80:
            size, value = 0, first
        else:
            size = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}.get(first, -1)
            if size < 0 or position + size >= len(data):
                break
            value = int.from_bytes(data[position + 1 : position + 1 + size], "big")
        found.append(value)
        position += 1 + size
    return found


def unpack_envelope(header: bytes) -> Any:
    """The envelope in the header of a passing message.

    Raises:
        ProtocolError: Too long, no such kind, or not of the kind's form.
    """
    # A step may end as many requests as a client has: the only envelope whose length follows the load.
    limit = CONTROL_BODY_BYTES_MAX if header[0] == kinds.ENDS else HEADER_BYTES_MAX
    if len(header) > limit:
        raise ProtocolError(f"header holds {len(header)} bytes, limit is {limit}", size=len(header))
    return _decode(_envelope_decoders.get(header[0]), memoryview(header)[1:], header[0])


def unpack_control(header: bytes) -> Any:
    """The struct of a control message.

    Raises:
        ProtocolError: Too large, no such kind, or not of the kind's form.
    """
    if len(header) > CONTROL_BODY_BYTES_MAX:
        name = kinds.NAMES.get(header[0], hex(header[0]))
        raise ProtocolError(f"{name} holds {len(header)} bytes, limit is {CONTROL_BODY_BYTES_MAX}", size=len(header))
    return _decode(_body_decoders.get(header[0]), memoryview(header)[1:], header[0])


def unpack_hello(header: bytes) -> Any:
    """CLIENT_HELLO or WORKER_HELLO of this version.

    Raises:
        VersionMismatchError: It is of another one, whatever that has after its number.
        ProtocolError: As of `unpack_control`.
    """
    version = next(iter(leading_integers(memoryview(header)[1:], 1)), kinds.PROTOCOL_VERSION)
    if version == kinds.PROTOCOL_VERSION:
        hello = unpack_control(header)
        version = hello.version
    if version != kinds.PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"peer speaks version {version} of the protocol, controller speaks {kinds.PROTOCOL_VERSION} alone",
            peer=version,
            controller=kinds.PROTOCOL_VERSION,
        )
    return hello


def unpack_chunks(header: bytes) -> chunks.Chunks:
    """The content of CHUNKS. Raises: ProtocolError."""
    columns = _decode(_chunks_decoder, memoryview(header)[ROUTE_BYTES:], kinds.CHUNKS)
    columns.check()
    return columns


def unpack_ends_body(body: bytes) -> chunks.EndsBody:
    """Body of ENDS. Raises: ProtocolError."""
    content = _decode(_ends_decoder, body, kinds.ENDS)
    content.chunks.check()
    return content


def unpack_request(operation: str, body: bytes) -> payloads.AnyRequest:
    """Body of SUBMIT and DISPATCH. Raises: ProtocolError."""
    request: payloads.AnyRequest = _decode(_request_decoders.get(operation), body, kinds.DISPATCH)
    return request


def unpack_result(raw: bytes | memoryview, kind: type[T]) -> T:
    """A unary result. Raises: ProtocolError."""
    return _decode(msgspec.msgpack.Decoder(kind), raw, kinds.ENDS)


def _decode(decoder: msgspec.msgpack.Decoder[T] | None, data: bytes | memoryview, kind: int) -> T:
    if decoder is None:
        raise ProtocolError(f"{_name_of(kind)} is not a message with a body of its own", kind=kind)
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as error:
        raise ProtocolError(f"{_name_of(kind)} does not decode: {error}", kind=kind) from None


def _name_of(kind: int) -> str:
    return kinds.NAMES.get(kind, f"kind 0x{kind:02x}")
