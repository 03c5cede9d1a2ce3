"""A caller's arguments: what is taken reaches the worker as it is, and all else is an error that names the parameter."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import enum
import math
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.client import values
from zfabric.client.many import Feed
from zfabric.client.requests import (
    call_timeout_ms,
    count_request,
    embed_request,
    generate_request,
    model_name,
    operate_request,
    query_timeout_ms,
    vectors,
)
from zfabric.core.client.bodies import encoded
from zfabric.errors import FabricError, ParameterRangeError, ProtocolError, RequestError, UnsupportedParameterError
from zfabric.limits import CALL_TIMEOUT_MS, FRAME_BYTES_MAX, NESTING_MAX, QUERY_TIMEOUT_MS
from zfabric.wire import codec
from zfabric.wire.payloads import AnyRequest, GenerateRequest
from zfabric.wire.sampling import ALL_PARAMETERS, WHAT_THE_CONTEXT_LEAVES, SamplingOptions
from zfabric.wire.tasks import EmbedResult


@dataclasses.dataclass
class Point:
    x: int = 1


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 2


class Text(str):
    __slots__ = ()


class Odd:
    """Raises whatever is asked of it."""

    def tolist(self) -> list[int]:
        raise OSError("no list today")


class Indexed:
    def __index__(self) -> int:
        return 7


def cyclic() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def received(request: AnyRequest, operation: str = "generate") -> Any:
    """The request as its worker gets it."""
    back = codec.unpack_request(operation, encoded(request, FRAME_BYTES_MAX))
    back.validate()
    return back


def sent(prompt: object = "p", **options: Any) -> GenerateRequest:
    back: GenerateRequest = received(generate_request(prompt, options)[0])
    return back


WRONG = [
    ("prompt", {"prompt": "half \ud800"}),
    ("prompt", {"prompt": b"bytes"}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": ["a"]}),
    ("prompt_token_ids", {"prompt_token_ids": [1.0]}),
    ("prompt_token_ids", {"prompt_token_ids": [1, True]}),
    ("prompt_token_ids", {"prompt_token_ids": [1, None]}),
    ("prompt_token_ids", {"prompt_token_ids": [-1]}),
    ("prompt_token_ids", {"prompt_token_ids": [2**32]}),
    ("prompt_token_ids", {"prompt_token_ids": [2**70]}),
    ("prompt_token_ids", {"prompt_token_ids": {1, 2}}),
    ("prompt_token_ids", {"prompt_token_ids": "12"}),
    ("prompt_token_ids", {"prompt_token_ids": b"12"}),
    ("prompt_token_ids", {"prompt_token_ids": (n for n in range(3))}),
    ("prompt_token_ids", {"prompt_token_ids": np.zeros(3)}),
    ("prompt_token_ids", {"prompt_token_ids": np.zeros((2, 2), dtype=np.int64)}),
    ("prompt_token_ids", {"prompt_token_ids": Odd()}),
    ("messages", {"messages": "hello"}),
    ("messages", {"messages": {"role": "user", "content": "x"}}),
    ("messages", {"messages": ["hello"]}),
    ("messages", {"messages": [{"content": "x"}]}),
    ("messages", {"messages": [{"role": 5, "content": "x"}]}),
    ("messages", {"messages": [{"role": "user", "content": "\udfff"}]}),
    ("messages", {"messages": [{"role": "user", "content": {1, 2}}]}),
    ("messages", {"messages": [{"role": "user", "content": Point()}]}),
    ("messages", {"messages": [{"role": "user", "content": (n for n in "ab")}]}),
    ("messages", {"messages": [{"role": "user", "content": cyclic()}]}),
    ("messages", {"messages": [{"role": "user", "content": deep(NESTING_MAX)}]}),
    ("messages", {"messages": [{"role": "user", "content": 2**70}]}),
    ("messages", {"messages": [{"role": "user", "content": Odd()}]}),
    ("messages", {"messages": [{"role": "user", 5: "x"}]}),
    ("messages", {"messages": [{"role": "user", "\ud800": "x"}]}),
    ("messages", {"messages": [Point()]}),
    ("tools", {"tools": {"a": 1}}),
    ("tools", {"tools": [5]}),
    ("tools", {"tools": [{"f": Point()}]}),
    ("tools", {"tools": [{"f": b"bytes"}]}),
    ("tools", {"tools": [{"f": print}]}),
    ("response_format", {"response_format": "json"}),
    ("response_format", {"response_format": {"f": {1}}}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("temperature", {"temperature": 10**400}),
    ("temperature", {"temperature": [1.0]}),
    ("top_p", {"top_p": 1 + 0j}),
    ("top_k", {"top_k": 5.0}),
    ("top_k", {"top_k": np.float32(5)}),
    ("n", {"n": True}),
    ("n", {"n": "2"}),
    ("n", {"n": np.array([2])}),
    ("seed", {"seed": 1.5}),
    ("seed", {"seed": 2**70}),
    ("seed", {"seed": "7"}),
    ("max_new_tokens", {"max_new_tokens": 16.0}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_tokens", {"max_tokens": 16.0}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 5, "max_new_tokens": 6}),
    ("max_tokens", {"max_tokens": 5, "max_new_tokens": None}),
    ("stop", {"stop": None}),
    ("stop", {"stop": 5}),
    ("stop", {"stop": ["a", 5]}),
    ("stop", {"stop": ["a", None]}),
    ("stop", {"stop": b"x"}),
    ("stop", {"stop": {"a"}}),
    ("stop", {"stop": ["\ud800"]}),
    ("stop", {"stop": ""}),
    ("stop_token_ids", {"stop_token_ids": None}),
    ("stop_token_ids", {"stop_token_ids": "5"}),
    ("stop_token_ids", {"stop_token_ids": 5.0}),
    ("stop_token_ids", {"stop_token_ids": True}),
    ("stop_token_ids", {"stop_token_ids": [5, -1]}),
    ("ignore_eos", {"ignore_eos": 1}),
    ("ignore_eos", {"ignore_eos": "yes"}),
    ("ignore_eos", {"ignore_eos": None}),
    ("logit_bias", {"logit_bias": {2**70: 1.0}}),
    ("logit_bias", {"logit_bias": {5: math.nan}}),
    ("logit_bias", {"logit_bias": {5: math.inf}}),
    ("logit_bias", {"logit_bias": {5: "1"}}),
    ("logit_bias", {"logit_bias": {"5": 1.0}}),
    ("logit_bias", {"logit_bias": {-1: 1.0}}),
    ("logit_bias", {"logit_bias": [(5, 1.0)]}),
    ("guided_json", {"guided_json": {"type": "object"}}),
    ("guided_choice", {"guided_choice": {"a", "b"}}),
    ("logprobs", {"logprobs": True}),
    ("deadline_ms", {"deadline_ms": "5"}),
    ("deadline_ms", {"deadline_ms": 5.0}),
    ("deadline_ms", {"deadline_ms": -1}),
    ("deadline_ms", {"deadline_ms": 10**12}),
    ("deadline_ms", {"deadline_ms": True}),
    ("timeout", {"timeout": "5"}),
    ("timeout", {"timeout": -1}),
    ("timeout", {"timeout": math.nan}),
    ("timeout", {"timeout": math.inf}),
    ("timeout", {"timeout": 5, "deadline_ms": 5_000}),
    ("priority", {"priority": 0.5}),
    ("priority", {"priority": "1"}),
    ("priority", {"priority": None}),
    ("priority", {"priority": 1_001}),
    ("resume", {"resume": "sometimes"}),
    ("resume", {"resume": None}),
    ("resume", {"resume": ["exact"]}),
    ("temperatur", {"temperatur": 1}),
    ("request_id", {"request_id": "x"}),
]


@pytest.mark.parametrize(("name", "options"), WRONG, ids=[f"{name}-{number}" for number, (name, _) in enumerate(WRONG)])
def test_a_wrong_value_is_an_error_that_names_its_parameter(name: str, options: dict[str, Any]) -> None:
    given_values = dict(options)
    prompt = given_values.pop("prompt", None if {"messages", "prompt_token_ids"} & set(options) else "p")
    with pytest.raises(RequestError) as caught:
        generate_request(prompt, given_values)
    assert caught.value.details["parameter"] == name
    assert name in caught.value.message
    assert len(caught.value.message) < 400
    caught.value.message.encode()


def test_the_place_of_what_is_wrong_is_told() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]\.content\[0\]\.image is a Point"):
        sent(None, messages=[{"role": "user"}, {"role": "user", "content": [{"image": Point()}]}])
    with pytest.raises(RequestError, match=r"prompt_token_ids\[2\] is a float"):
        sent(None, prompt_token_ids=[1, 2, 3.0])
    with pytest.raises(RequestError, match="half a character at position 5"):
        sent("half \ud800")


@pytest.mark.parametrize(
    "row",
    [
        [1, 2, 3],
        (1, 2, 3),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], dtype=np.uint8),
        list(np.array([1, 2, 3])),
        [np.int64(1), Indexed() and 2, np.uint32(3)],
        array.array("i", [1, 2, 3]),
        np.array([[1, 2, 3], [4, 5, 6]])[0],
    ],
    ids=lambda row: type(row).__name__,
)
def test_arrays_are_taken_for_what_they_are(row: Any) -> None:
    assert sent(None, prompt_token_ids=row).prompt_token_ids == [1, 2, 3]
    assert sent(stop_token_ids=row).sampling.stop_token_ids == (1, 2, 3)
    request, _ = embed_request([row, "text"], {})
    assert received(request, "embed").inputs == [[1, 2, 3], "text"]


def test_tensors_are_taken_for_what_they_are() -> None:
    torch = pytest.importorskip("torch")
    row = torch.tensor([[1, 2, 3]])[0]
    assert sent(None, prompt_token_ids=row).prompt_token_ids == [1, 2, 3]
    assert sent(None, prompt_token_ids=list(row)).prompt_token_ids == [1, 2, 3]
    assert sent(seed=torch.tensor(5)).sampling.seed == 5
    with pytest.raises(RequestError, match="prompt_token_ids"):
        sent(None, prompt_token_ids=torch.zeros(3))


def test_numbers_and_texts_of_other_types_are_taken_for_what_they_are() -> None:
    sampling = sent(
        Text("a prompt"),
        temperature=np.float32(0.5),
        top_p=1,
        top_k=Level.LOW,
        n=np.int8(2),
        seed=Indexed(),
        ignore_eos=np.bool_(True),
        stop=np.array(["a", "b"]),
        bad_words=[Colour.RED],
        logit_bias=MappingProxyType({np.int64(5): np.float64(-1.5), 6: 2, 7: -math.inf}),
        stop_token_ids=np.int64(9),
        max_tokens=np.int64(16),
    ).sampling
    assert (sampling.temperature, sampling.top_k, sampling.n, sampling.seed) == (0.5, 2, 2, 7)
    assert (sampling.ignore_eos, sampling.stop, sampling.bad_words) == (True, ("a", "b"), ("red",))
    assert (sampling.logit_bias, sampling.stop_token_ids) == ({5: -1.5, 6: 2.0, 7: -math.inf}, (9,))
    assert sampling.max_new_tokens == 16
    message = OrderedDict(role=Colour.RED, content=[{"type": "image", "image": bytearray(b"png")}], weight=np.arange(2))
    assert sent(None, messages=(message,)).messages == [
        {"role": "red", "content": [{"type": "image", "image": b"png"}], "weight": [0, 1]}
    ]


def test_one_text_or_number_is_a_list_of_one_and_defaults_stay() -> None:
    sampling = sent(stop="x", stop_token_ids=5, guided_choice="a").sampling
    assert (sampling.stop, sampling.stop_token_ids, sampling.guided_choice) == (("x",), (5,), ("a",))
    assert sent().sampling.changed() == []
    assert sent(max_tokens=None).sampling.max_new_tokens == WHAT_THE_CONTEXT_LEAVES
    assert sent(temperature=None).sampling == sent().sampling == SamplingOptions()
    assert sent(max_tokens=7, max_new_tokens=7).sampling.max_new_tokens == 7


def test_every_parameter_of_a_request_has_a_way_to_be_taken() -> None:
    for name in ALL_PARAMETERS:
        with pytest.raises(RequestError, match=name):
            generate_request("p", {name: Point()})


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 300),
    st.floats(),
    st.text(st.characters(), max_size=3),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2),
    st.binary(max_size=3),
    st.sampled_from(
        [np.int64(3), np.float32(0.5), np.arange(3), np.array("x"), Point(), Odd(), Colour.RED, object(), 1j]
    ),
    st.frozensets(st.integers(), max_size=2),
)
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(
            st.one_of(st.text(max_size=3), st.integers(0, 9), st.sampled_from(["role"])), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
NAMES = sorted(
    {*ALL_PARAMETERS, "messages", "prompt_token_ids", "tools", "response_format", "deadline_ms", "timeout", "priority"}
)


@settings(max_examples=400)
@given(st.sampled_from(NAMES), anything)
def test_whatever_is_given_is_sent_or_refused_by_name(name: str, value: Any) -> None:
    prompt = None if name in ("messages", "prompt_token_ids") else "p"
    try:
        request, submit = generate_request(prompt, {name: value})
    except FabricError as error:
        assert error.details.get("parameter", name) == name or "prompt" in error.message
        error.message.encode()
        return
    received(request)
    codec.encode(submit)


@settings(max_examples=200)
@given(anything)
def test_whatever_is_embedded_counted_or_operated_is_sent_or_refused(value: Any) -> None:
    calls: list[tuple[str, Any]] = [
        ("embed", lambda: embed_request(value, {})),
        ("embed", lambda: embed_request(["x"], {"dimensions": value})),
        ("count_tokens", lambda: count_request(value, None, None)),
        ("count_tokens", lambda: count_request(None, value, None)),
        ("operate", lambda: operate_request("call", {"argument": value}, None)),
        ("operate", lambda: operate_request(value, {}, None)),
    ]
    for operation, call in calls:
        try:
            request, _ = call()
        except FabricError as error:
            error.message.encode()
        else:
            received(request, operation)
    for check in (model_name, query_timeout_ms, call_timeout_ms):
        with contextlib.suppress(RequestError):
            codec.encode(check(value))


@pytest.mark.parametrize(
    ("name", "inputs", "options"),
    [
        ("inputs", 5, {}),
        ("inputs", None, {}),
        ("inputs", [5], {}),
        ("inputs", [None], {}),
        ("inputs", b"x", {}),
        ("inputs", ["\ud800"], {}),
        ("inputs", [[1.5]], {}),
        ("inputs", [["a"]], {}),
        ("inputs", {"a"}, {}),
        ("inputs", [], {}),
        ("inputs", np.zeros((2, 2)), {}),
        ("dimensions", "x", {"dimensions": 2.0}),
        ("dimensions", "x", {"dimensions": 0}),
        ("normalize", "x", {"normalize": 1}),
        ("truncate", "x", {"truncate": "some"}),
        ("pooling", "x", {"pooling": "max"}),
        ("dimension", "x", {"dimension": 2}),
        ("temperature", "x", {"temperature": 2}),
        ("priority", "x", {"priority": 0.5}),
        ("timeout", "x", {"timeout": "1"}),
    ],
    ids=str,
)
def test_wrong_embeddings_are_refused_by_name(name: str, inputs: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        embed_request(inputs, options)
    assert caught.value.details["parameter"] == name
    assert name in caught.value.message


def test_times_in_seconds_are_rounded_up() -> None:
    assert generate_request("p", {"timeout": 1.5})[1]["deadline_ms"] == 1_500
    assert generate_request("p", {"timeout": 0.0001})[1]["deadline_ms"] == 1
    assert generate_request("p", {"timeout": np.float64(2)})[1]["deadline_ms"] == 2_000
    assert generate_request("p", {"timeout": None, "deadline_ms": 7})[1]["deadline_ms"] == 7
    assert generate_request("p", {})[1]["deadline_ms"] is None
    assert (query_timeout_ms(None), query_timeout_ms(0.25)) == (QUERY_TIMEOUT_MS, 250)
    assert (call_timeout_ms(None), call_timeout_ms(3)) == (CALL_TIMEOUT_MS, 3_000)


def test_names_have_their_length() -> None:
    assert model_name(Text("m" * 256)) == "m" * 256
    for wrong, kind in (
        ("m" * 257, ParameterRangeError),
        ("", ParameterRangeError),
        (5, RequestError),
        (None, RequestError),
    ):
        with pytest.raises(kind) as caught:
            model_name(wrong)
        assert caught.value.details["parameter"] == "model"


def test_a_feed_takes_each_kind_of_prompt_and_refuses_what_is_wrong_for_all() -> None:
    feed = Feed("m", ["a"], 4, {"n": np.int64(3)})
    assert feed.choices == 3
    for name, arguments in (
        ("concurrency", ("m", ["a"], 0, {})),
        ("concurrency", ("m", ["a"], 1.5, {})),
        ("prompts", ("m", "a text", 1, {})),
        ("prompts", ("m", 5, 1, {})),
        ("prompts", ("m", {"a": 1}, 1, {})),
        ("messages", ("m", ["a"], 1, {"messages": []})),
        ("temperature", ("m", ["a"], 1, {"temperature": "hot"})),
        ("model", (5, ["a"], 1, {})),
    ):
        with pytest.raises(RequestError) as caught:
            Feed(*arguments)
        assert caught.value.details["parameter"] == name


def test_vectors_that_do_not_fit_are_no_arrays() -> None:
    assert vectors(EmbedResult(1, 2, b"\0" * 8), 1).shape == (1, 2)
    for result in (EmbedResult(-1, -1, b"\0" * 4), EmbedResult(2, 2, b"\0" * 8), EmbedResult(2, 2, b"\0" * 16)):
        with pytest.raises(ProtocolError):
            vectors(result, 1)


def test_large_structures_take_time_in_proportion() -> None:
    """An image as an array is a list of numbers, not a call for each."""
    picture = np.zeros((300, 300, 3), dtype=np.uint8)
    assert values.structure("messages", picture) == picture.tolist()
    with pytest.raises(UnsupportedParameterError):
        generate_request("p", {"nothing": picture})
