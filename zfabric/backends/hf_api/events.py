"""Server-sent events from bytes, whatever their cut: pieces of lines, half characters, comments, keep-alives."""

from __future__ import annotations

import itertools
from typing import Final

from zfabric.errors import BackendError

#: The largest event. A chunk with prompt logprobs of a long prompt has some MB; without a bound, a line that never ends
#: would take all memory.
EVENT_BYTES_MAX: Final = 16 * 1024 * 1024


class EventReader:
    """Cuts a byte stream into the data of its events. Time is linear in the bytes, however they are cut."""

    __slots__ = ("_buffer", "_data", "_limit", "_scanned", "_size")

    def __init__(self, limit: int = EVENT_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._data: list[bytes] = []
        self._size = 0
        self._limit = limit

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that this piece completes.

        Raises:
            BackendError: An event is larger than the limit.
        """
        self._buffer += piece
        events: list[bytes] = []
        start = 0
        while (end := self._buffer.find(b"\n", max(start, self._scanned))) >= 0:
            self._line(bytes(self._buffer[start:end]).removesuffix(b"\r"), events)
            start = end + 1
        del self._buffer[:start]
        self._scanned = len(self._buffer)
        if self._size + len(self._buffer) > self._limit:
            raise BackendError(
                f"the upstream sent an event of more than {self._limit} bytes", event_bytes_max=self._limit
            )
        return events

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
            self._data = []
            self._size = 0
        elif line.startswith(b"data:"):
            data = line[5:].removeprefix(b" ")
            self._data.append(data)
            self._size += len(data)


class HalfCharacters:
    """Joins characters that a server cut in two between events: bytes of UTF-8, or halves of a surrogate pair."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """Whole characters only; the rest waits for the next piece."""
        if not self._held:
            if text.isascii():
                return text
            try:
                text.encode()
            except UnicodeEncodeError:
                pass
            else:
                return text
        text = _joined(self._held + text)
        keep = 0
        while keep < min(3, len(text)) and "\ud800" <= text[-1 - keep] <= "\udfff":
            keep += 1
        self._held = text[len(text) - keep :]
        return shown(text[: len(text) - keep])

    def finish(self) -> str:
        """What never became whole."""
        held, self._held = self._held, ""
        return shown(held)


def _joined(text: str) -> str:
    """Surrogate pairs as characters, and bytes (surrogate escapes) that make characters as those."""
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass") if _pairs(text) else text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text


def _pairs(text: str) -> bool:
    return any(
        "\ud800" <= first <= "\udbff" and "\udc00" <= second <= "\udfff" for first, second in itertools.pairwise(text)
    )


def shown(text: str) -> str:
    """A surrogate that stayed alone is no character: it shows as U+FFFD. What a text has that comes in one piece."""
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
