"""What one engine alone knows on its way: keys and types of requests, and what answers tell besides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.worker_side import WorkerSide, last, token
from zfabric.client.mailbox import Collector, Mailbox
from zfabric.client.requests import generate_request
from zfabric.core.worker.session import Spoiled
from zfabric.errors import FabricError, RequestError, TooLargeError
from zfabric.limits import EXTRA_KEYS_MAX
from zfabric.wire import codec
from zfabric.wire.answers import Outcome
from zfabric.wire.payloads import Delta, TextRequest, Usage

#: A value of each key that means the same everywhere.
VALUES: dict[str, Any] = {
    "cache_salt": "team-7", "kv_transfer_params": {"do_remote_decode": True}, "extra_args": {"plug-in": [1, 2.5]},
    "include_stop": True, "detokenize": False, "allowed_token_ids": [3, 4],
}  # fmt: skip


def test_what_a_caller_gives_arrives_as_it_is() -> None:
    request, _ = generate_request("Hello", {"extra": {**VALUES, "anything": {"a": [None, "b"]}}})
    there = codec.unpack_request("generate", codec.encode(request))
    assert isinstance(there, TextRequest)
    there.validate()
    assert there.extra == {**VALUES, "anything": {"a": [None, "b"]}}


@pytest.mark.parametrize(
    ("extra", "error", "text"),
    [
        ({"cache_salt": 5}, RequestError, "'cache_salt': expected `str`, got `int`"),
        ({"cache_salt": ""}, RequestError, "'cache_salt'"),
        ({"cache_salt": "../a"}, RequestError, "'cache_salt'"),
        ({"cache_salt": "a" * 129}, RequestError, "'cache_salt'"),
        ({"kv_transfer_params": [1]}, RequestError, "'kv_transfer_params'"),
        ({"extra_args": "x"}, RequestError, "'extra_args'"),
        ({"include_stop": "yes"}, RequestError, "'include_stop'"),
        ({"detokenize": 0}, RequestError, "'detokenize'"),
        ({"allowed_token_ids": [1.5]}, RequestError, "'allowed_token_ids'"),
        ({"allowed_token_ids": []}, RequestError, "'allowed_token_ids'"),
        ({"": 1}, RequestError, "0 characters"),
        ({f"key {number}": 1 for number in range(EXTRA_KEYS_MAX + 1)}, TooLargeError, "65 keys"),
        ({"image": b"bytes"}, RequestError, "extra.image is a bytes"),
        ({1: 2}, RequestError, "has a key that"),
        ("text", RequestError, "extra is a str, it must be a map"),
    ],
)
def test_what_is_of_another_type_is_refused_by_name_before_it_is_sent(
    extra: Any, error: type[FabricError], text: str
) -> None:
    with pytest.raises(error, match=text):
        generate_request("Hello", {"extra": extra})


@pytest.mark.parametrize("window", [1_000, 0, 2])
def test_a_reader_has_what_was_told_however_it_was_merged(window: int) -> None:
    side = WorkerSide()
    name = side.begin(1, window=window)
    side.emit((name, Delta(text="a", token_ids=[1], extra={"fingerprint": "fp", "phase": 1})))
    side.emit((name, token(2)))
    ending = Delta(text="b", token_ids=[3], finish_reason="stop", usage=Usage(1, 3))
    ending.extra = {"phase": 2, "citations": ["x"]}
    side.emit((name, ending))
    side.grant(1, 0, 1_000)
    chunks = side.heard().chunks
    told = {"fingerprint": "fp", "phase": 2, "citations": ["x"]}
    box, collector = Mailbox(lambda: None), Collector(1, lambda: None, lambda units: None)
    for chunk in chunks:
        for sink in (box, collector):
            sink.arrived(chunk.index, chunk.text, list(chunk.token_ids), chunk.extra)
    for sink in (box, collector):
        sink.ended(None, Outcome())
    seen = [box.take() for _ in iter(lambda: bool(box.waiting), False)]
    assert {key: value for delta in seen for key, value in (delta.extra or {}).items()} == told
    for sink in (box, collector):
        completion = sink.completion("r", "m")
        assert completion.extra == told
        assert json.loads(json.dumps(completion.to_dict()))["extra"] == told


def test_what_cannot_be_sent_ends_its_own_stream() -> None:
    for wrong in ({"a": object()}, {1: 2}, ["a"]):
        side = WorkerSide()
        bad, good = side.begin(1), side.begin(2)
        orders = side.emit((bad, Delta(token_ids=[1], extra=wrong)), (good, token(1)))  # type: ignore[arg-type]
        assert [order.request_id for order in orders if isinstance(order, Spoiled)] == [bad]
        side.emit((good, last(2)))
        assert [chunk.request for chunk in side.heard().chunks] == [2, 2]
