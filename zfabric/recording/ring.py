"""A recording on disk: a few files in turn, each a stream of MessagePack.

A file is mapped into memory and has its full size from the start, so an event costs its encoding and a copy, and no call of the
kernel; and what was copied is the kernel's, so that it is there after any death of the process (not of the host). The stream is
of binary values, each of which holds the events of one turn of the loop as an array. The byte that makes one a binary value is
written last, so that what was copied in part is not there; the first zero in its place is the end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import msgspec

from zfabric.errors import ConfigurationError
from zfabric.limits import RECORD_PARTS
from zfabric.recording.config import RecordingConfig

#: The first field of what each part begins with.
MAGIC: Final = "zfabric recording"
VERSION: Final = 1
#: MessagePack's mark of binary data whose length follows in four bytes.
BINARY: Final = 0xC6
LENGTH_BYTES: Final = 4


class Entry(Protocol):
    """An event: when, what, and its values, by name or in an order that `Head.fields` tells. It is encoded as an array."""

    @property
    def at_ns(self) -> int: ...


class Head(msgspec.Struct, array_like=True, kw_only=True):
    """What a part begins with.

    Attributes:
        magic, version: What this is.
        of: "controller" or "worker".
        build: Of the program.
        began_ns: When the part began, on the clock of its events.
        unix_ns: The same moment in nanoseconds since 1970.
        fields: Of each event whose values are an array, their names.
    """

    magic: str = MAGIC
    version: int = VERSION
    of: str = ""
    build: str = ""
    began_ns: int = 0
    unix_ns: int = 0
    fields: dict[str, tuple[str, ...]] = {}


class Ring:
    """Keeps the newest events within bounds of bytes and time.

    Args:
        config: Where, and how much.
        of: What the process is.
        build: Of the program.
        fields: Names of events' values.
        clock: The clock of the events, in nanoseconds.
        wall_clock: Nanoseconds since 1970.
        state: What each part begins with, given the time.
        on_failure: Told once that nothing is recorded any more, and why: a full disk must not end what serves.

    Raises:
        ConfigurationError: The file cannot be made.
    """

    def __init__(
        self,
        config: RecordingConfig,
        *,
        of: str,
        build: str,
        fields: dict[str, tuple[str, ...]],
        clock: Callable[[], int],
        wall_clock: Callable[[], int],
        state: Callable[[int], Sequence[Entry]] = lambda _: (),
        on_failure: Callable[[OSError], object] = lambda _: None,
    ) -> None:
        self._config = config
        self._of = of
        self._build = build
        self._fields = fields
        self._clock = clock
        self._wall_clock = wall_clock
        self._state = state
        self._on_failure = on_failure
        self._encoder = msgspec.msgpack.Encoder(enc_hook=str)
        self._size = config.bytes_max // RECORD_PARTS
        self._span_ns = config.ms_max * 1_000_000 // RECORD_PARTS
        self._map: mmap.mmap | None = None
        self._descriptor = -1
        self._used = self._old_ns = self._last_ns = self._shift_ns = 0
        try:
            self._open()
        except OSError as error:
            raise ConfigurationError(f"{config.file} cannot be recorded to: {error}", path=str(config.file)) from error

    def write(self, entries: Sequence[Entry]) -> None:
        """Keep some events, in order of time. Never raises for the disk's sake."""
        if self._map is None:
            return
        data = self._encoder.encode(entries)
        last_ns = entries[-1].at_ns
        try:
            if last_ns >= self._old_ns or not self._has_room(data):
                self._finish()
                self._open()
        except OSError as error:
            self._map = None
            self._on_failure(error)
            return
        if not self._has_room(data):
            # More in one turn than a part holds.
            data = self._encoder.encode([(last_ns, "left_out", (len(data),))])
        self._put(data)
        self._last_ns = last_ns

    def close(self) -> None:
        """Give back what was not used."""
        with contextlib.suppress(OSError):
            self._finish()

    def _has_room(self, data: bytes) -> bool:
        return self._used + 1 + LENGTH_BYTES + len(data) <= self._size

    def _put(self, data: bytes) -> None:
        assert self._map is not None
        begin = self._used
        end = begin + 1 + LENGTH_BYTES + len(data)
        self._map[begin + 1 : end] = len(data).to_bytes(LENGTH_BYTES) + data
        self._map[begin] = BINARY
        self._used = end

    def _open(self) -> None:
        """Begin a part; the oldest goes, and so do those that are too old."""
        now_ns = self._clock()
        parts = self._config.parts
        _forget_old(parts, self._wall_clock() - self._config.ms_max * 1_000_000)
        for older, newer in zip(reversed(parts[1:]), reversed(parts[:-1]), strict=True):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
        descriptor = os.open(parts[0], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _allocate(descriptor, self._size)
            self._map = mmap.mmap(descriptor, self._size)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._last_ns = descriptor, now_ns
        self._used, self._old_ns = 0, now_ns + self._span_ns
        head = Head(of=self._of, build=self._build, began_ns=now_ns, unix_ns=self._wall_clock(), fields=self._fields)
        self._shift_ns = head.unix_ns - now_ns
        self._put(self._encoder.encode(head))
        state = self._encoder.encode(self._state(now_ns))
        if self._has_room(state):
            self._put(state)

    def _finish(self) -> None:
        mapped, self._map = self._map, None
        if mapped is None:
            return
        mapped.close()
        descriptor, self._descriptor = self._descriptor, -1
        try:
            os.truncate(descriptor, self._used)
            last_ns = self._last_ns + self._shift_ns
            os.utime(descriptor, ns=(last_ns, last_ns))
        finally:
            os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Have the disk's blocks now: a mapped file that finds none later would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _forget_old(parts: Iterable[os.PathLike[str]], before_ns: int) -> None:
    """Remove parts whose last event is older: a file's time is that of its last event."""
    for part in parts:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(part).st_mtime_ns < before_ns:
                os.unlink(part)
