"""The protocol as properties: what is packed comes back, and no bytes whatever raise anything but ProtocolError."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw, Struct

from zfabric.errors import FabricError, ParameterRangeError, ProtocolError, UnsupportedParameterError
from zfabric.limits import CONTROL_BODY_BYTES_MAX, DEADLINE_MAX_MS, HEADER_BYTES_MAX
from zfabric.wire import answers, codec, flow, kinds, messages, questions, sampling, tasks
from zfabric.wire.chunks import EndsBody
from zfabric.wire.load import CachedBlocks, Load
from zfabric.wire.locks import lock_of

u32 = st.integers(0, 2**32 - 1)
u63 = st.integers(0, 2**63 - 1)
attempt = st.integers(0, 1_000)
deadline = st.none() | st.integers(0, DEADLINE_MAX_MS)
name = st.text(min_size=1, max_size=30)
operation = st.sampled_from(["generate", "embed", "count_tokens", "operate"])
hashes = st.integers(0, 3).flatmap(lambda count: st.binary(min_size=8 * count, max_size=8 * count))
credit_line = st.builds(flow.CreditLine, request=u63, attempt=attempt, next=u32, window=u32, again=st.booleans())
load = st.builds(
    Load,
    running=u32,
    waiting=u32,
    slots=st.integers(0, 65_536),
    progress=u63,
    tokens_per_second=st.floats(0, 1e9),
    dispatches=u63,
    kv_blocks_free=st.none() | u32,
    draining=st.booleans(),
    engines=st.lists(st.none() | u63, max_size=3),
    cached=st.lists(
        st.builds(CachedBlocks, model=name, stored=hashes, removed=hashes, whole=st.booleans(), unit=u32), max_size=2
    ),
)
model_info = st.builds(
    messages.ModelInfo,
    name=name,
    aliases=st.lists(name, max_size=3),
    context_length=u32,
    capabilities=st.lists(name, max_size=3),
    details=st.dictionaries(name, st.integers(-5, 5) | st.text(max_size=5) | st.none() | st.booleans(), max_size=3),
    engine=st.integers(0, 9),
)
lock = st.binary(max_size=16)
claim = st.builds(messages.Claim, request=u63, attempt=attempt, next=u32, window=u32, model=name)
carried = st.builds(
    messages.Carried,
    instance=u63,
    request=u63,
    attempt=attempt,
    operation=operation,
    model=name,
    finished=st.booleans(),
    lock=lock,
)
end = st.builds(messages.End, request=u63, attempt=attempt, code=st.integers(0, 99_999))
envelopes: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        messages.Submit,
        request=u63,
        attempt=attempt,
        operation=operation,
        model=name,
        priority=st.integers(-1_000, 1_000),
        deadline_ms=deadline,
        window=u32,
        resume_from=u32,
    ),
    st.builds(
        messages.Dispatch,
        client=u32,
        instance=u63,
        request=u63,
        attempt=attempt,
        operation=operation,
        model=name,
        lock=lock,
    ),
    st.builds(messages.Ends, instance=u63, ends=st.lists(end, max_size=4)),
)
bodies: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        messages.ClientHello,
        version=u32,
        build=name,
        instance=u63,
        token=st.binary(max_size=64),
        claims=st.lists(claim, max_size=3),
        secret=st.binary(max_size=64),
    ),
    st.builds(
        messages.WorkerHello,
        version=u32,
        build=name,
        name=name,
        instance=u63,
        models=st.lists(model_info, min_size=1, max_size=3),
        load=load,
        carried=st.lists(carried, max_size=3),
    ),
    st.builds(
        messages.Welcome,
        version=u32,
        build=name,
        epoch=u63,
        session=u32,
        token=st.binary(max_size=32),
        beat_ms=u32,
        lease_ms=u32,
        frame_bytes_max=u32,
    ),
    load,
    st.builds(messages.Beat, u63),
    st.builds(flow.Cancel, st.lists(u63, max_size=5)),
    st.builds(flow.Credit, st.lists(credit_line, max_size=5)),
    st.builds(flow.Grant, client=u32, instance=u63, lines=st.lists(credit_line, max_size=5)),
    st.builds(flow.Abort, instance=u63, attempts=st.lists(st.tuples(u63, attempt), max_size=5)),
    st.builds(messages.Drain, u32),
    st.builds(messages.Goodbye, name),
    st.builds(questions.Query, number=u63, what=name),
    st.builds(questions.Fault, code=u32, message=name, request=st.none() | u63, query=st.none() | u63),
    st.builds(messages.Claims, st.lists(claim, max_size=3)),
    st.builds(messages.CarriedMore, st.lists(carried, max_size=3)),
)


@given(envelopes)
def test_envelopes_come_back(envelope: Any) -> None:
    assert codec.unpack_envelope(codec.pack_envelope(envelope)) == envelope


@given(bodies)
def test_bodies_come_back(message: Struct) -> None:
    header, body = codec.pack(message)
    assert not body
    assert codec.unpack_control(header) == message


@given(bodies)
def test_bodies_are_plain_messagepack(message: Struct) -> None:
    """The reference implementation reads them, and what it writes is read back as the same."""
    header, _ = codec.pack(message)
    plain = msgpack.unpackb(header[1:], strict_map_key=False)
    assert isinstance(plain, list)
    assert codec.unpack_control(header[:1] + msgpack.packb(plain)) == message


@given(
    st.lists(
        st.builds(answers.Chunk, u63, attempt, st.integers(0, 9), u32, st.text(max_size=9), st.lists(u32, max_size=5))
    )
)
def test_chunks_come_back(chunks: list[answers.Chunk]) -> None:
    header, body = codec.pack_chunks(7, chunks)
    assert header.startswith(codec.chunks_route(7))
    assert not body
    assert codec.unpack_chunks(header).rows() == chunks


def test_results_travel_as_they_are() -> None:
    outcome = answers.Outcome(result=codec.raw(tasks.EmbedResult(1, 2, b"12345678")))
    back = codec.unpack_ends_body(codec.encode(EndsBody(outcomes=[outcome]))).outcomes[0]
    assert isinstance(back.result, Raw)
    assert codec.unpack_result(back.result, tasks.EmbedResult) == tasks.EmbedResult(1, 2, b"12345678")


@given(u63, attempt, name, st.integers(1, 30))
def test_the_subject_is_read_where_the_rest_is_broken(number: int, tries: int, text: str, cut: int) -> None:
    """A fault can name what it answers, unless the numbers themselves are cut off."""
    submit = codec.pack_envelope(messages.Submit(request=number, attempt=tries, operation="generate", model=text))
    assert codec.subject_of(submit) == (number, tries, None)
    broken = submit[: max(20, len(submit) - cut)] + b"\xc1"
    assert codec.subject_of(broken) == (number, tries, None)
    query, _ = codec.pack(questions.Query(number=number, what=text))
    assert codec.subject_of(query[:10]) == (None, None, number if len(msgpack.packb(number)) < 9 else None)


@given(st.integers(0, 255), st.binary(max_size=40))
def test_no_bytes_trouble_the_search_for_a_subject(kind: int, data: bytes) -> None:
    request, attempt_number, query = codec.subject_of(bytes([kind]) + data)
    assert request is None or 0 <= request < 2**63
    assert attempt_number is None or 0 <= attempt_number <= 1_000
    assert query is None or 0 <= query < 2**63
    assert codec.subject_of(b"") == codec.NO_SUBJECT


def test_locks_open_to_their_secret_alone() -> None:
    assert len(lock_of(b"secret")) == 16
    assert lock_of(b"secret") != lock_of(b"Secret")
    assert lock_of(b"") == b""


@settings(max_examples=500)
@given(st.integers(0, 255), st.binary(max_size=200))
def test_no_bytes_raise_anything_but_protocol_error(kind: int, data: bytes) -> None:
    for decode in (
        lambda: codec.unpack_control(bytes([kind]) + data),
        lambda: codec.unpack_envelope(bytes([kind]) + data),
        lambda: codec.unpack_chunks(data),
        lambda: codec.unpack_ends_body(data),
        lambda: codec.unpack_request("generate", data),
        lambda: codec.unpack_request("nonsense", data),
    ):
        with contextlib.suppress(ProtocolError):
            decode()


@pytest.mark.parametrize(
    "bomb",
    [b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff" + b"\x80" * 65_535, b"\xc6\xff\xff\xff\xff"],
    ids=["nesting", "lying array", "empty maps", "lying binary"],
)
def test_bombs_are_refused(bomb: bytes) -> None:
    for kind in kinds.NAMES:
        with pytest.raises(ProtocolError):
            codec.unpack_control(bytes([kind]) + bomb)


def test_sizes_are_checked_before_decoding() -> None:
    with pytest.raises(ProtocolError, match="limit is"):
        codec.unpack_control(bytes([kinds.CANCEL]) + b"\0" * CONTROL_BODY_BYTES_MAX)
    with pytest.raises(ProtocolError, match="limit is"):
        codec.unpack_envelope(bytes([kinds.SUBMIT]) + b"\0" * HEADER_BYTES_MAX)


def test_kinds_are_distinct_and_every_one_has_a_direction() -> None:
    assert len(set(kinds.NAMES.values())) == len(kinds.NAMES)
    assert set(kinds.NAMES) == kinds.FROM_CLIENT | kinds.FROM_WORKER | kinds.TO_CLIENT | kinds.TO_WORKER


@pytest.mark.parametrize(
    "values",
    [
        {"bad_words": ("fine", "")},
        {"stop": ("",)},
        {"logit_bias": {5: 1e39}},
        {"logit_bias": {5: -100.5}},
        {"logit_bias": {5: float("nan")}},
        {"logit_bias": {5: float("inf")}},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 0.0},
    ],
)
def test_values_that_would_make_nonsense_of_an_answer_are_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ParameterRangeError, match=next(iter(values))):
        sampling.SamplingParams(**values).validate()


def test_the_ends_of_ranges_are_within_them() -> None:
    bias = {1: -100.0, 2: 100.0, 3: float("-inf")}
    sampling.SamplingParams(logit_bias=bias, repetition_penalty=0.01, bad_words=(" ",)).validate()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(allow_nan=False),
            "top_p": st.floats(-1, 2),
            "top_k": st.integers(-3, 5),
            "n": st.integers(-1, 200),
            "max_new_tokens": st.none() | st.integers(-1, 10),
            "min_new_tokens": st.integers(-1, 10),
            "seed": st.none() | st.integers(),
        },
    )
)
def test_validation_names_the_parameter(given_values: dict[str, Any]) -> None:
    params = sampling.SamplingParams(**given_values)
    try:
        params.validate()
    except ParameterRangeError as error:
        assert error.details["parameter"] in sampling.ALL_PARAMETERS
        assert str(error.details["parameter"]) in str(error)
    else:
        assert 0 <= params.temperature <= 100
        assert 0 < params.top_p <= 1
        assert params.top_k == -1 or params.top_k >= 1


def test_what_is_not_supported_is_refused_by_name() -> None:
    params = sampling.SamplingParams(top_k=3, seed=1)
    params.require(frozenset({"top_k", "seed"}), "x")
    with pytest.raises(UnsupportedParameterError, match="'seed' is not supported by x") as caught:
        params.require(frozenset({"top_k"}), "x")
    assert isinstance(caught.value, FabricError)
    sampling.SamplingParams().require(frozenset(), "x")
