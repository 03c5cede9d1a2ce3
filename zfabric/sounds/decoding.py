"""Sounds that are compressed, decoded by PyAV, which has FFmpeg inside: the extra "audio" of this package.

Files come from anybody, so FFmpeg opens what uploads of sounds are and nothing else: no containers that name other files or
addresses. Pictures are not decoded, and it is stopped at the bound, whatever a head says.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.sounds.bounds import check_kind

if TYPE_CHECKING:
    import numpy as np

#: FFmpeg's names of the containers of OpenAI's list (flac, mp3, mp4, mpeg, mpga, m4a, ogg, webm) and of what browsers record.
_CONTAINERS: Final = "aac,flac,matroska,webm,mov,mp4,m4a,mp3,ogg"
#: And of decoders of what is in them.
_DECODERS: Final = (
    "aac",
    "alac",
    "flac",
    "mp1float",
    "mp2",
    "mp2float",
    "mp3",
    "mp3float",
    "opus",
    "libopus",
    "vorbis",
)


def decoded(data: bytes, rate: int, seconds_max: float) -> np.ndarray:
    """One channel of floating samples, the mean of those that there are.

    Args:
        data: Of a file.
        rate: Samples in a second that are wanted.
        seconds_max: It is decoded no further, and refused, if it is longer.

    Raises:
        RequestError: It cannot be read, is no sound, or is longer.
        UnsupportedOperationError: PyAV is not installed.
    """
    import numpy as np

    most = int(seconds_max * rate)
    found: list[np.ndarray] = []
    count = 0
    for part in _parts(data, rate):
        count += len(part)
        if count > most:
            raise too_long(None, seconds_max)
        found.append(part)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)


def too_long(seconds: float | None, seconds_max: float) -> RequestError:
    """The error of a sound that takes so many seconds, if that is known."""
    takes = f"takes {seconds:.2f} s" if seconds is not None else f"takes more than {seconds_max:g} s"
    return RequestError(f"a sound {takes}, at most {seconds_max:g} s are heard: send it in parts", limit=seconds_max)


def _parts(data: bytes, rate: int) -> Iterator[np.ndarray]:
    try:
        import av
    except ImportError as error:
        raise UnsupportedOperationError(
            f"a sound is no WAV, and what reads others is not installed: pip install 'zfabric[audio]' ({error})"
        ) from error
    options = {"format_whitelist": _CONTAINERS, "codec_whitelist": ",".join(_DECODERS), "protocol_whitelist": "none"}
    try:
        with av.open(io.BytesIO(data), options=options) as container:
            stream = next((one for one in container.streams.audio), None)
            if stream is None:
                raise RequestError("a file that is to be heard has no sound in it")
            if stream.codec_context.name not in _DECODERS:
                raise RequestError(f"a sound is coded as {stream.codec_context.name!r}, which is not read here")
            yield from _resampled(_frames(container, stream), rate)
    except (av.error.FFmpegError, ValueError) as error:
        raise RequestError(f"a sound cannot be read: {_told(error)}") from None


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """What a stream decodes to; what cannot be decoded amid it is passed over, as players do.

    Raises:
        av.error.FFmpegError: The first of it cannot be decoded, and nothing behind it either.
    """
    import av

    failure: av.error.FFmpegError | None = None
    found = False
    for packet in container.demux(stream):
        try:
            for frame in packet.decode():
                found = True
                yield frame
        except av.error.InvalidDataError as error:
            failure = failure or error
    if failure is not None and not found:
        raise failure


def _resampled(frames: Iterator[Any], rate: int) -> Iterator[np.ndarray]:
    """One channel of each frame, and what the filter holds back at the end."""
    import av

    resampler, kind = None, None
    for frame in frames:
        check_kind(frame.sample_rate, frame.layout.nb_channels)
        now = (frame.sample_rate, frame.layout.name, frame.format.name)
        if now != kind or resampler is None:
            # A sound may change its kind, as where two recordings were put together.
            yield from _mixed(resampler.resample(None) if resampler is not None else [])
            resampler, kind = av.AudioResampler(format="fltp", layout=frame.layout, rate=rate), now
        yield from _mixed(resampler.resample(frame))
    if resampler is not None:
        yield from _mixed(resampler.resample(None))


def _mixed(frames: list[Any]) -> Iterator[np.ndarray]:
    import numpy as np

    for frame in frames:
        mean = frame.to_ndarray().mean(axis=0, dtype=np.float32)
        yield np.nan_to_num(mean, posinf=1.0, neginf=-1.0)


def _told(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
