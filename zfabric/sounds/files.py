"""Files of sounds, of any format that is read here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zfabric.errors import RequestError
from zfabric.sounds.decoding import decoded, too_long
from zfabric.sounds.resampling import resampled
from zfabric.sounds.wav import Wav, is_wav

if TYPE_CHECKING:
    import numpy as np


def samples_of(data: bytes, rate: int, seconds_max: float) -> np.ndarray:
    """One channel of floating samples, the mean of those that there are.

    Args:
        data: Of a WAV; with the extra "audio" also of an MP3, FLAC, Ogg, MP4 or WebM.
        rate: Samples in a second that are wanted.
        seconds_max: The longest sound: no more is decoded.

    Raises:
        RequestError: It cannot be read, is empty, or is longer.
        UnsupportedOperationError: It is no WAV, and the extra is not installed.
    """
    if is_wav(data):
        wav = Wav(data)
        if wav.seconds > seconds_max:
            raise too_long(wav.seconds, seconds_max)
        samples = resampled(wav.samples(), wav.rate, rate)
    else:
        samples = decoded(data, rate, seconds_max)
    if not len(samples):
        raise RequestError("a sound has no samples")
    return samples
