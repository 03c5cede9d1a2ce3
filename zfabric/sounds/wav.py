"""WAV (RFC 2361), read and written."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from zfabric.errors import RequestError
from zfabric.sounds.bounds import check_kind

if TYPE_CHECKING:
    import numpy as np

#: Formats of samples: whole numbers, floating ones, and one that names the format further behind.
_WHOLE, _FLOATING, _EXTENSIBLE = 1, 3, 0xFFFE
#: What a whole number of 16 bits stands for 1 with, as in readers.
_TOP: Final = 32_768


def is_wav(data: bytes) -> bool:
    """Whether a file says that it is one."""
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


class Wav:
    """A file whose head is read, and whose samples are not yet.

    Args:
        data: The whole file.

    Attributes:
        rate: Samples in a second.
        frames: Samples of each channel.

    Raises:
        RequestError: It cannot be read.
    """

    def __init__(self, data: bytes) -> None:
        found = dict(reversed(list(_chunks(data))))
        head, body = found.get(b"fmt "), found.get(b"data")
        if head is None or len(head) < 16 or body is None:
            raise RequestError("a sound cannot be read: its WAV has no format or no data")
        kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", head)
        if kind == _EXTENSIBLE and len(head) >= 26:
            (kind,) = struct.unpack_from("<H", head, 24)
        size = bits // 8
        if (kind, bits) not in {
            (_WHOLE, 8),
            (_WHOLE, 16),
            (_WHOLE, 24),
            (_WHOLE, 32),
            (_FLOATING, 32),
            (_FLOATING, 64),
        }:
            raise RequestError(f"a sound cannot be read: its WAV has samples of format {kind} with {bits} bits")
        check_kind(rate, channels)
        self.rate: int = rate
        self.frames: int = len(body) // (size * channels)
        self._kind, self._bits, self._channels = kind, bits, channels
        self._body = body[: self.frames * size * channels]

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.frames / self.rate

    def samples(self) -> np.ndarray:
        """One channel of floating samples, the mean of those that there are."""
        values = _values(self._body, self._kind, self._bits).reshape(self.frames, self._channels)
        mean: np.ndarray = values.mean(axis=1, dtype="float32")
        return mean


def wav_of(samples: np.ndarray, rate: int) -> bytes:
    """A file of one channel of samples between -1 and 1, of 16 bits: what Whisper was trained on."""
    import numpy as np

    body = np.clip(np.round(samples * _TOP), -_TOP, _TOP - 1).astype("<i2").tobytes()
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, _WHOLE, 1, rate, 2 * rate, 2, 16)
    inner = b"WAVE" + head + struct.pack("<4sI", b"data", len(body)) + body
    return struct.pack("<4sI", b"RIFF", len(inner)) + inner


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Names and contents; one that says more than there is ends with the file, as where a recorder was stopped."""
    place, view = 12, memoryview(data)
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        yield name, view[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _values(body: memoryview, kind: int, bits: int) -> np.ndarray:
    """Samples between -1 and 1, of all channels in turn."""
    import numpy as np

    if kind == _FLOATING:
        return np.nan_to_num(np.frombuffer(body, dtype=f"<f{bits // 8}").astype(np.float32), posinf=1.0, neginf=-1.0)
    if bits == 8:
        return (np.frombuffer(body, dtype=np.uint8).astype(np.float32) - 128.0) / 128.0
    if bits == 24:
        wide = np.zeros((len(body) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(body, dtype=np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0].astype(np.float32) / 2.0**31
    return np.frombuffer(body, dtype=f"<i{bits // 8}").astype(np.float32) / 2.0 ** (bits - 1)
