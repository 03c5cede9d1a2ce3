"""Sounds of chat messages: taken from the request itself, never fetched, and made into samples. WAV alone is read."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from zfabric.backends.front.chat import parts_of
from zfabric.errors import RequestError
from zfabric.wire.chat import Message

if TYPE_CHECKING:
    import numpy as np

#: Types of parts that are sounds.
SOUNDS: Final = ("audio", "audio_url", "input_audio")
#: Rates of samples in a second, between those of telephones' slowest codecs and of studios.
_RATES: Final = (1_000, 384_000)
_CHANNELS_MAX: Final = 64
#: Formats of a WAV's samples (RFC 2361): whole numbers, floating ones, and one that names the format further behind.
_WHOLE, _FLOATING, _EXTENSIBLE = 1, 3, 0xFFFE
#: Zero crossings of the filter on either side, at the lower rate: what is above the band is down by some 60 dB.
_CROSSINGS: Final = 16
#: The band ends somewhat below half the lower rate, so that the filter has room to fall.
_BAND: Final = 0.95
#: Samples that are resampled at once, which bounds the memory that it takes.
_AT_ONCE: Final = 16_384


def sounds_of(messages: Sequence[Message]) -> list[bytes]:
    """The bytes of all sounds, in order. Raises: RequestError: One is neither bytes nor a data URI."""
    parts = [part for message in messages for part in parts_of(message)]
    return [_bytes(part) for part in parts if isinstance(part, dict) and part.get("type") in SOUNDS]


def _bytes(part: dict[str, Any]) -> bytes:
    """Of {"type": "audio", "audio": …}, {"type": "audio_url", "audio_url": {"url": …}} or OpenAI's
    {"type": "input_audio", "input_audio": {"data": …, "format": …}}, whose data are base64 without a head."""
    value = part.get("audio", part.get("audio_url", part.get("input_audio")))
    plain = False
    if isinstance(value, dict):
        plain = "data" in value
        value = value["data"] if plain else value.get("url")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RequestError(f"a sound is {type(value).__name__}, it must be bytes or a data URI")
    head, comma, body = value.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        value, plain = body, True
    if not plain:
        raise RequestError("a sound is a text that is no base64 data URI; sounds are not fetched from addresses")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise RequestError(f"a sound's data are no base64: {error}") from None


def samples_of(data: bytes, rate: int, seconds_max: float) -> np.ndarray:
    """One channel of floating samples, the mean of those that there are.

    Args:
        data: Of a WAV.
        rate: Samples in a second that are wanted.
        seconds_max: The longest sound.

    Raises:
        RequestError: It cannot be read, is empty, or is longer.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise RequestError("a sound is no WAV, which is all that is read here: send it as one")
    samples, own = _wav(data, seconds_max)
    if not len(samples):
        raise RequestError("a sound has no samples")
    return resampled(samples, own, rate)


def _check(rate: int, channels: int, frames: int, seconds_max: float) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise RequestError(f"a sound has {rate} samples a second, it must have {_RATES[0]} … {_RATES[1]}", rate=rate)
    if not 1 <= channels <= _CHANNELS_MAX:
        raise RequestError(f"a sound has {channels} channels, it must have 1 … {_CHANNELS_MAX}", channels=channels)
    if frames > seconds_max * rate:
        raise RequestError(
            f"a sound takes {frames / rate:.2f} s, this model hears {seconds_max:g} s at once: send it in parts",
            limit=seconds_max,
        )


def _wav(data: bytes, seconds_max: float) -> tuple[np.ndarray, int]:
    """Samples of a WAV, and their rate."""
    found = dict(reversed(list(_chunks(data))))
    head, body = found.get(b"fmt "), found.get(b"data")
    if head is None or len(head) < 16 or body is None:
        raise RequestError("a sound cannot be read: its WAV has no format or no data")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", head)
    if kind == _EXTENSIBLE and len(head) >= 26:
        (kind,) = struct.unpack_from("<H", head, 24)
    size = bits // 8
    if (kind, bits) not in {(_WHOLE, 8), (_WHOLE, 16), (_WHOLE, 24), (_WHOLE, 32), (_FLOATING, 32), (_FLOATING, 64)}:
        raise RequestError(f"a sound cannot be read: its WAV has samples of format {kind} with {bits} bits")
    frames = len(body) // max(1, size * channels)
    _check(rate, channels, frames, seconds_max)
    values = _values(body[: frames * size * channels], kind, bits)
    return values.reshape(frames, channels).mean(axis=1, dtype="float32"), rate


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents; one that says more than there is ends with the file, as where a recorder was stopped."""
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        yield name, data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _values(body: bytes, kind: int, bits: int) -> np.ndarray:
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


def resampled(samples: np.ndarray, own: int, rate: int) -> np.ndarray:
    """Samples at another rate: each is the sum of those around it, weighted by a sinc in a Hann window.

    Source: J. O. Smith, "Digital Audio Resampling", https://ccrma.stanford.edu/~jos/resample/.

    Args:
        samples: One channel.
        own: Their rate.
        rate: The one that is wanted.
    """
    import numpy as np

    if own == rate:
        return samples
    # In the samples' own steps: the filter's cut-off, and how far it reaches.
    band = min(1.0, rate / own) * _BAND
    reach = int(np.ceil(_CROSSINGS / band))
    padded = np.pad(samples, reach + 1)
    offsets = np.arange(-reach, reach + 2)
    count = -(-len(samples) * rate // own)
    made = np.empty(count, dtype=np.float32)
    for begin in range(0, count, _AT_ONCE):
        places = np.arange(begin, min(begin + _AT_ONCE, count), dtype=np.float64) * (own / rate)
        whole = np.floor(places).astype(np.int64)
        distances = offsets[None] - (places - whole)[:, None]
        window = np.where(np.abs(distances) < reach, 0.5 + 0.5 * np.cos(np.pi * distances / reach), 0.0)
        weights = (np.sinc(distances * band) * band * window).astype(np.float32)
        made[begin : begin + len(places)] = (padded[whole[:, None] + offsets[None] + reach + 1] * weights).sum(axis=1)
    return made
