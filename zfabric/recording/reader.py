"""Reads recordings. One that breaks off, as after the death of a process, is read as far as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from zfabric.errors import ConfigurationError
from zfabric.recording.config import part_names
from zfabric.recording.ring import BINARY, LENGTH_BYTES, MAGIC, VERSION, Head

#: What the head of a part takes at most.
_HEAD_BYTES_MAX: Final = 16_384
_ENTRIES: Final = msgspec.msgpack.Decoder(list[tuple[int, str, list[Any] | dict[str, Any]]])


@dataclass(frozen=True)
class Event:
    """One event of a recording.

    Attributes:
        unix_ns: When, in nanoseconds since 1970.
        of: Who recorded it: "controller" or "worker".
        name: What happened (`zfabric.core.recorder.MEANINGS`, and the events of the controller's log).
        fields: The values that belong to it.
    """

    unix_ns: int
    of: str
    name: str
    fields: dict[str, Any]

    @property
    def request(self) -> str:
        """The name of its request at its client, or "" where it is about none."""
        key = self._key
        return f"{key[1]:x}" if key is not None else ""

    @property
    def attempt(self) -> int:
        """The attempt that it is about; 0 where it is about none."""
        key = self._key
        return key[2] if key is not None else 0

    @property
    def _key(self) -> list[int] | None:
        """Its request's client, number and attempt; None where it is about none."""
        key = self.fields.get("request")
        is_one = isinstance(key, list) and len(key) == 3 and all(isinstance(part, int) for part in key)
        return key if is_one else None


@dataclass
class Recording:
    """What was read.

    Attributes:
        events: In order of time, of all files together.
        broken: Files that broke off in the middle of an event.
    """

    events: list[Event] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)


def read_recordings(files: Sequence[Path]) -> Recording:
    """Read recordings with all of their parts, as those of a controller and of its workers.

    Args:
        files: The newest part of each.

    Raises:
        ConfigurationError: A file is not there, cannot be read, or is no recording.
    """
    found = Recording()
    for file in files:
        parts = [part for part in reversed(part_names(file)) if part.exists()]
        if not parts:
            raise ConfigurationError(f"recording {file} does not exist", path=str(file))
        for part in parts:
            if not _read_part(part, found):
                found.broken.append(part)
    found.events.sort(key=lambda event: event.unix_ns)
    return found


def is_recording(file: Path) -> bool:
    """Whether a file begins as a recording does."""
    with file.open("rb") as opened:
        frame = next(_frames(opened.read(_HEAD_BYTES_MAX)), None)
    return frame is not None and MAGIC.encode() in frame


def _read_part(part: Path, found: Recording) -> bool:
    """Add a part's events. Returns: whether it was whole."""
    try:
        data = part.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"recording {part} cannot be read: {error}", path=str(part)) from error
    frames = _frames(data)
    try:
        head = msgspec.msgpack.decode(next(frames, None) or b"", type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError):
        head = Head(magic="")
    if (head.magic, head.version) != (MAGIC, VERSION):
        raise ConfigurationError(f"{part} is no recording of version {VERSION}", path=str(part))
    for frame in frames:
        try:
            entries = _ENTRIES.decode(frame) if frame is not None else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            entries = None
        if entries is None:
            return False
        shift_ns = head.unix_ns - head.began_ns
        found.events += [
            Event(at_ns + shift_ns, head.of, name, _named(values, head.fields.get(name, ())))
            for at_ns, name, values in entries
        ]
    return True


def _named(values: list[Any] | dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return values if isinstance(values, dict) else dict(zip(names, values, strict=False))


def _frames(data: bytes) -> Iterator[bytes | None]:
    """The binary values of a stream; None for a last one that is not whole, or no such value."""
    position = 0
    while position < len(data) and data[position]:
        begin = position + 1 + LENGTH_BYTES
        end = begin + int.from_bytes(data[position + 1 : begin])
        if data[position] != BINARY or end > len(data) or begin > len(data):
            yield None
            return
        yield data[begin:end]
        position = end
