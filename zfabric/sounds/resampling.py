"""Samples at another rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

#: Zero crossings of the filter on either side, at the lower rate: what is above the band is down by some 60 dB.
_CROSSINGS: Final = 16
#: The band ends somewhat below half the lower rate, so that the filter has room to fall.
_BAND: Final = 0.95
#: Samples that are resampled at once, which bounds the memory that it takes.
_AT_ONCE: Final = 4_096


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
    offsets = np.arange(-reach, reach + 2)
    # Weights depend on where a sample lies between two of the old ones, and those places repeat.
    phases, step = rate // math.gcd(own, rate), own // math.gcd(own, rate)
    count = -(-len(samples) * rate // own)
    padded = np.pad(samples, (reach, reach + 2 + step))
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(offsets))
    made = np.empty(count, dtype=np.float32)
    for phase in range(min(phases, count)):
        whole, part = divmod(phase * own, rate)
        distances = offsets - part / rate
        window = np.where(np.abs(distances) < reach, 0.5 + 0.5 * np.cos(np.pi * distances / reach), 0.0)
        weights = (np.sinc(distances * band) * band * window).astype(np.float32)
        its = made[phase::phases]
        for begin in range(0, len(its), _AT_ONCE):
            end = min(begin + _AT_ONCE, len(its))
            # A copy, for fast products: rows of windows overlap.
            its[begin:end] = (
                np.ascontiguousarray(windows[whole:][begin * step : end * step : step][: end - begin]) @ weights
            )
    return made
