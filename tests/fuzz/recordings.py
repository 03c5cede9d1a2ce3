"""Inputs that get far: real conversations, and messages of each kind from the grammar of the simulation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.broker import Bench, FakeClient, FakeWorker
from tests.fuzz.edges import BOUNDARY, CALLS, PATHS
from tests.fuzz.script import Step, written
from tests.recorded import FILE
from tests.unit.test_zmtp import DEALER_READY, GREETING
from zfabric.core.recorder import FIELDS
from zfabric.recording.ring import BINARY, LENGTH_BYTES, Head
from zfabric.testing.grammar import Gossip, Grammar
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, ChunkExtra, Outcome
from zfabric.wire.chunks import EndsBody, columns_of
from zfabric.wire.flow import Abort, CreditLine, Grant
from zfabric.wire.messages import Dispatch, Drain, End, Ends, Welcome
from zfabric.wire.payloads import CountRequest, GenerateRequest, OperateRequest, TextRequest
from zfabric.wire.questions import Answer, Fault, Query
from zfabric.wire.sampling import SamplingOptions, SamplingParams
from zfabric.wire.tasks import (
    ClassifyRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)
from zfabric.zmtp.frames import MORE, command, head

#: How many conversations of each sort.
_COUNT: Final = 40


def zmtp_streams() -> Iterator[bytes]:
    """What a dealer without keys sends, cut in pieces of several sizes."""
    frames = head(3, MORE) + b"abc" + head(300, 0) + bytes(300) + command(b"PING", b"\0\1context")
    for step in (1, 7, 255):
        yield bytes([step]) + GREETING + DEALER_READY + frames
    for name, conversation in _recorded():
        if "null" in name:
            yield b"\xff" + conversation


def curve_streams() -> Iterator[bytes]:
    """The same with keys, which are others' than this server's."""
    for name, conversation in _recorded():
        if "curve" in name:
            yield b"\xff" + conversation


def _recorded() -> Iterator[tuple[str, bytes]]:
    for name, conversation in json.loads(FILE.read_text())["conversations"].items():
        theirs = [bytes.fromhex(said) for is_theirs, said in conversation["handshake"] if is_theirs]
        yield name, b"".join(theirs) + bytes.fromhex(conversation["sent"])


def messages() -> Iterator[bytes]:
    """A header of each kind."""
    for frames in _of_grammar():
        yield frames[0]
    for frames in (*controller_says(), *to_worker()):
        yield frames[0]


def requests() -> Iterator[bytes]:
    """A body for each operation."""
    sampling = SamplingOptions(temperature=0.5, stop=("x",), n=2, logit_bias={3: 1.0})
    chat = TextRequest(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}], sampling=sampling)
    for operation, request in enumerate(
        (
            chat,
            EmbedRequest(inputs=["a", [1, 2]], dimensions=3),
            CountRequest(prompt="a"),
            CountRequest(messages=[{"role": "user", "content": "x"}]),
            DetokenizeRequest(token_ids=[1, 2]),
            ScoreRequest(query="a", documents=["b"]),
            ClassifyRequest(inputs=["a"]),
            OperateRequest(call="load_lora", arguments={"name": "a", "deep": [[1, {"a": None}]]}),
            EmbedTokensRequest(inputs=["a", [1, 2]]),
            RewardRequest(inputs=["a", [{"role": "user", "content": "x"}]]),
        )
    ):
        yield bytes([operation]) + codec.encode(request)


def conversations() -> Iterator[bytes]:
    """What clients and workers say to a controller."""
    for seed in range(_COUNT):
        rng = random.Random(seed)
        drawn = list(_of_grammar(seed))
        yield written(Step(rng.randrange(16), *rng.choice(drawn)) for _ in range(rng.randint(2, 20)))


def to_clients() -> Iterator[bytes]:
    """What a controller says to a client."""
    yield from _scripts(controller_says)


def to_workers() -> Iterator[bytes]:
    """What a controller says to a worker."""
    yield from _scripts(to_worker)


def upstreams() -> Iterator[bytes]:
    """Streams of the three protocols."""
    said = {
        0: {"choices": [{"index": 0, "delta": {"content": "a stop", "reasoning_content": "b", "tool_calls": [
            {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}, "finish_reason": "tool_calls"}]},
        1: {"choices": [{"index": 1, "text": "a", "token_ids": [1], "logprobs": {"tokens": ["a"], "token_logprobs": [-1],
            "top_logprobs": [{"a": -1}]}, "finish_reason": "length"}], "usage": {"prompt_tokens": 1}},
        2: {"token": {"id": 1, "text": "a", "logprob": -1, "special": False}, "details": {"finish_reason": "length",
            "generated_tokens": 1, "input_length": 1}},
    }  # fmt: skip
    for whose, event in said.items():
        for step in (1, 30, 255):
            yield bytes([whose, step]) + b": comment\n\ndata: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n"


#: Bodies that each endpoint takes, by what its path ends with.
_BODIES: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "chat/completions": (
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": True, "stop": ["a"]},
        {"model": "m", "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}], "logprobs": True,
         "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
         "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}},
    ),
    "v1/completions": ({"model": "m", "prompt": ["a", [1, 2]], "logprobs": 1, "echo": True, "logit_bias": {"3": 1.0}},),
    "v1/embeddings": ({"model": "m", "input": ["a", [1, 2]], "encoding_format": "base64", "dimensions": 3},),
    "messages": (
        {"model": "m", "max_tokens": 3, "system": [{"type": "text", "text": "s"}], "messages": [
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]}],
         "tools": [{"name": "f", "input_schema": {"type": "object"}}], "thinking": {"type": "disabled"}},
    ),
    "count_tokens": ({"model": "m", "messages": [{"role": "user", "content": "x"}]},),
    "generate": ({"model": "m", "prompt": "x", "seed": 1, "temperature": 0.5}, {"model": "m", "token_ids": [1]}),
    "pooling": ({"model": "m", "input": ["a"], "task": "token_embed"},),
    "rerank": ({"model": "m", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},),
    "score": ({"model": "m", "text_1": "a", "text_2": ["b", "c"]},),
    "classify": ({"model": "m", "input": ["a"]},),
    "responses": (
        {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"}], "max_output_tokens": 3},
    ),
    "/tokenize": ({"model": "m", "prompt": "x"}, {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
    "detokenize": ({"model": "m", "tokens": [1, 2]},),
}  # fmt: skip


def bodies() -> Iterator[bytes]:
    """What callers of the gateway send to each of its paths."""
    for place, path in enumerate(PATHS):
        for end, some in _BODIES.items():
            if path.endswith(end):
                yield from (bytes([place]) + json.dumps(body).encode() for body in some)
        if "/audio/" in path:
            yield bytes([place]) + _form(
                model=b"m", file=b"RIFF\x24\0\0\0WAVEfmt ", response_format=b"text", temperature=b"0.5"
            )


def _form(**fields: bytes) -> bytes:
    """A body of multipart/form-data."""
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (BOUNDARY, name.encode(), value)
        for name, value in fields.items()
    ]
    return b"".join(parts) + b"--%s--\r\n" % BOUNDARY


def answers() -> Iterator[bytes]:
    """Results of each call of the client library, and answers to its questions."""
    told: list[object] = [
        EmbedResult(rows=2, dimensions=2, data=bytes(16)),
        EmbedTokensResult(tokens=[1, 1], dimensions=2, data=bytes(16)),
        3,
        [1, 2],
        "a",
        [0.5, 1.5],
        [[0.5, 0.5], [0.1, 0.9]],
        [[1.0], [2.0]],
        {"done": [1, None, "x"]},
    ]
    told += [{}] * (len(CALLS) - len(told))
    for place, result in enumerate(told):
        yield bytes([place]) + codec.encode(result)
    bench = Bench()
    asker = FakeClient(bench).hello(11)
    FakeWorker(bench).hello("w")
    asker.submit(1)
    questions = ("models", "model", "workers", "status", "requests", "clients", "queue", "refresh", "config")
    for place, (what, name) in enumerate(zip(questions, ("", "m", *[""] * 7), strict=True), start=9):
        asker.inbox.clear()
        arguments: dict[str, object] = {"name": name} if name else {}
        bench.receive(asker.id, *codec.pack(Query(number=place, what=what, arguments=arguments)))
        for kind, answer, _ in asker.inbox:
            if kind == kinds.ANSWER and answer.result:
                yield bytes([place]) + bytes(answer.result)


def recorded() -> Iterator[bytes]:
    """Recordings of a controller with one request."""
    head = codec.encode(Head(of="controller", unix_ns=5, fields=FIELDS))
    key = [7, 1, 0]
    events = [
        [1, "started", ["b"]],
        [2, "worker_registered", {"worker": "w", "models": ["m"]}],
        [3, "submitted", [key, "c", "generate", "m", "", 0, None, 1_024, 0, 10]],
        [4, "dispatched", [key, "w", "m", {}]],
        [5, "answered", [key, "w", 0, 3, 2]],
        [6, "ended", [key, "done", 0, "w"]],
    ]
    for count in (1, 2, 6):
        parts = [events[place : place + count] for place in range(0, len(events), count)]
        yield b"".join(
            bytes([BINARY]) + len(part).to_bytes(LENGTH_BYTES) + part for part in (head, *map(codec.encode, parts))
        )


def _scripts(says: Callable[[], Iterator[codec.Frames]]) -> Iterator[bytes]:
    said = list(says())
    for frames in said:
        yield written([Step(0, *frames)])
    for seed in range(_COUNT):
        rng = random.Random(seed)
        yield written(Step(rng.randrange(16), *rng.choice(said)) for _ in range(rng.randint(2, 20)))


def _of_grammar(seed: int = 1) -> Iterator[codec.Frames]:
    """What clients and workers may say, of each kind some."""
    gossip = Gossip([(11, 1, 0), (12, 1, 0), (11, 2, 1)], [1, 2], ["w", "v"])
    grammar = Grammar(random.Random(seed), gossip)
    for _ in range(4):
        yield grammar.client_hello(11, b"t")
        yield grammar.worker_hello("w", 1, b"t", collide=True)
        yield grammar.query(1)
        for draw in (
            grammar.claims, grammar.submit, grammar.cancel, grammar.credit, grammar.beat, grammar.goodbye, grammar.carried,
            grammar.load, grammar.chunks, grammar.ends,
        ):  # fmt: skip
            yield draw()


def controller_says() -> Iterator[codec.Frames]:
    """To a client whose requests have the numbers 1, 2 and 3, and its question the number 1."""
    chunks = [Chunk(1, 0, 0, 0, "a ", [1]), Chunk(2, 0, 0, 0, "b", [], ChunkExtra(worker="w", exact=True))]
    yield codec.pack_chunks(3, chunks)
    yield codec.pack_chunks(3, [Chunk(1, 0, 0, 1, "c", [4, 5], ChunkExtra(finish_reason="stop", reasoning="r"))])
    for code in (0, 50301, 40400, 49901):
        body = EndsBody(chunks=columns_of(chunks[:1]), outcomes=[Outcome(units=1, message="m")])
        yield codec.pack_envelope(Ends(instance=7, ends=[End(request=1, attempt=0, code=code)])), codec.encode(body)
    yield codec.pack(Answer(number=1, code=0, result=codec.raw({"queued": 0})))
    yield codec.pack(Fault(code=40000, message="no", request=1, attempt=0))
    yield codec.pack_unknown_session()
    yield codec.pack(_again())


def to_worker() -> Iterator[codec.Frames]:
    for request in (1, 2, 3):
        envelope = Dispatch(
            client=7, instance=9, request=request, attempt=0, operation="generate", model="m", window=10, resume_from=0
        )
        sampling = SamplingParams(n=request)
        yield codec.pack_envelope(envelope), codec.encode(GenerateRequest(prompt="x", sampling=sampling))
        lines = [CreditLine(request=request, attempt=0, next=1, window=5, again=request == 2)]
        yield codec.pack(Grant(client=7, instance=9, lines=lines))
        yield codec.pack(Abort(instance=9, attempts=[(request, 0)]))
    yield codec.pack(Drain(1_000))
    yield codec.pack_unknown_session()
    yield codec.pack(_again())


def _again() -> Welcome:
    return Welcome(
        version=kinds.PROTOCOL_VERSION, build="", epoch=2, session=4, token=b"u", beat_ms=500, lease_ms=1_500,
        frame_bytes_max=4_096,
    )  # fmt: skip
