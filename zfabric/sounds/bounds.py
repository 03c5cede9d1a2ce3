"""What sounds may be, whichever file they come in."""

from __future__ import annotations

from typing import Final

from zfabric.errors import RequestError

#: Rates of samples in a second, between those of telephones' slowest codecs and of studios.
_RATES: Final = (1_000, 384_000)
_CHANNELS_MAX: Final = 64


def check_kind(rate: int, channels: int) -> None:
    """Raises: RequestError: No recorder makes such a sound."""
    if not _RATES[0] <= rate <= _RATES[1]:
        raise RequestError(f"a sound has {rate} samples a second, it must have {_RATES[0]} … {_RATES[1]}", rate=rate)
    if not 1 <= channels <= _CHANNELS_MAX:
        raise RequestError(f"a sound has {channels} channels, it must have 1 … {_CHANNELS_MAX}", channels=channels)
