"""What a request holds is counted without decoding it, and whatever bytes there are, counting comes to an end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric import limits
from zfabric.errors import TooLargeError
from zfabric.wire import bounds
from zfabric.wire.bounds import check_request

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=20),
    max_leaves=60,
)


class Counted:
    """The same by decoding it."""

    def __init__(self, value: Any) -> None:
        self.values = self.text = self.parts = 0
        self._count(value)

    def _count(self, value: Any) -> None:
        self.values += 1
        self.parts += isinstance(value, (str, bytes, list, dict))
        if isinstance(value, str):
            self.text += len(value.encode())
        elif isinstance(value, list):
            for item in value:
                self._count(item)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._count(key)
                self._count(item)


@settings(max_examples=200)
@given(values)
def test_it_counts_what_is_there(value: Any) -> None:
    counted, body = Counted(value), msgspec.msgpack.encode(value)
    for name, count in (("VALUES", counted.values), ("PARTS", counted.parts), ("TEXT_BYTES", counted.text)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bounds, "REQUEST_BYTES_UNSEEN", -1)
            patch.setattr(bounds, f"REQUEST_{name}_MAX", count)
            check_request(body)
            patch.setattr(bounds, f"REQUEST_{name}_MAX", count - 1)
            # One value alone is no list of values.
            if count and not (name == "VALUES" and not isinstance(value, (list, dict))):
                with pytest.raises(TooLargeError):
                    check_request(body)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_no_bytes_raise_anything_else(data: bytes, repeat: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "REQUEST_BYTES_UNSEEN", -1)
        try:
            check_request(data * 10**repeat)
        except TooLargeError as error:
            assert error.details["count"] > error.details["limit"]  # type: ignore[operator]


def test_a_usual_request_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_skip_plain", lambda *_: pytest.fail("it was"))
    check_request(msgspec.msgpack.encode(["x" * 60_000]))


def test_a_million_tokens_and_a_large_picture_are_no_more_than_a_request_may_hold() -> None:
    check_request(msgspec.msgpack.encode([None, None, [200_000] * 1_000_000]))
    check_request(msgspec.msgpack.encode([None, [{"content": [{"image": bytes(50 * 2**20)}]}]]))
    check_request(msgspec.msgpack.encode(["x" * limits.REQUEST_TEXT_BYTES_MAX]))


def test_what_is_too_much_is_known_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty million values are refused at their list's head, and text without reading it."""
    seen: list[int] = []

    def noting(body: bytes, position: int, count: int) -> tuple[int, int]:
        seen.append(position)
        return skip(body, position, count)

    skip = bounds._skip_plain
    monkeypatch.setattr(bounds, "_skip_plain", noting)
    for head in (b"\xdd", b"\xdf", b"\xdb"):
        with pytest.raises(TooLargeError):
            check_request(b"\x91" + head + (60_000_000).to_bytes(4, "big") + b"\x01" * 60_000_000)
    assert max(seen) < 16
