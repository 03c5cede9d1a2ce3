"""Server-sent events, and the JSON of what comes once for each token: written by hand, since it is nearly always the same."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.errors import FabricError
from zfabric.gateway.errors import error_object

#: The last event of OpenAI's streams.
DONE: Final = b"data: [DONE]\n\n"

encode: Final = msgspec.json.Encoder().encode


def event(value: Any) -> bytes:
    """One event with a JSON value."""
    return b"data: " + encode(value) + b"\n\n"


def failure(error: FabricError) -> bytes:
    """The end of a stream that breaks off: OpenAI's SDKs raise an APIError for it."""
    return event({"error": error_object(error)}) + DONE


class TextEvents:
    """The event of a piece of text, in two constant parts around the text.

    Args:
        before: The event's value as it begins, up to the text.
        after: The rest of it.
        name: The event's name, for APIs that name them.

    Example:
        >>> TextEvents(b'{"text":', b"}").of("a")
        b'data: {"text":"a"}\\n\\n'
    """

    __slots__ = ("_after", "_before")

    def __init__(self, before: bytes, after: bytes, *, name: bytes = b"") -> None:
        self._before = (b"event: " + name + b"\n" if name else b"") + b"data: " + before
        self._after = after + b"\n\n"

    def of(self, text: str) -> bytes:
        """The event."""
        return self._before + encode(text) + self._after
