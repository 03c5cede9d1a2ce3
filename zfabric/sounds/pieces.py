"""Long sounds in pieces, cut where it is quiet, so that no word is in two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from zfabric.errors import TooLargeError
from zfabric.limits import SOUND_BYTES_MAX, SOUND_SECONDS_MAX
from zfabric.sounds.files import samples_of
from zfabric.sounds.wav import Wav, is_wav, wav_of

if TYPE_CHECKING:
    import numpy as np

#: What models call the longest sound that they hear at once, in seconds, among their details.
HEARS_SECONDS: Final = "hears_seconds"
#: Samples in a second that Whisper hears.
RATE: Final = 16_000
#: The last part of a piece, in which it is cut: 3 s of 30, in which a speaker pauses, for a tenth more pieces at most.
_SEARCHED: Final = 0.1
#: How long it has to be quiet, and how exactly the place is found, in seconds: vLLM's window, and a hundredth.
_QUIET_S: Final = 0.1
_STEP_S: Final = 0.01


class Piece(NamedTuple):
    """A part of a sound.

    Attributes:
        start: Where it begins, in seconds.
        seconds: How long it takes.
        data: A file of it.
    """

    start: float
    seconds: float
    data: bytes


def pieces_of(data: bytes, piece_seconds: float, seconds_max: float = SOUND_SECONDS_MAX) -> list[Piece]:
    """A file in pieces, each a WAV; a WAV that is no longer than one piece as it is.

    It takes some 6 s of a processor and 240 MB beside the file for half an hour of MP3, so keep it off an event loop.

    Args:
        data: As of `samples_of`.
        piece_seconds: The longest piece: what a model hears at once.
        seconds_max: The longest sound.

    Raises:
        TooLargeError: The file has more than SOUND_BYTES_MAX.
        RequestError: It cannot be read, is empty, or is longer.
        UnsupportedOperationError: It is no WAV, and the extra "audio" is not installed.

    Example:
        >>> for piece in pieces_of(Path("talk.mp3").read_bytes(), piece_seconds=30):
        ...     part = {"type": "audio", "audio": piece.data}
        ...     print(piece.start, (await client.chat("whisper", [{"role": "user", "content": [part]}])).text)
    """
    if len(data) > SOUND_BYTES_MAX:
        raise TooLargeError(f"a sound has {len(data)} bytes, limit is {SOUND_BYTES_MAX}", limit=SOUND_BYTES_MAX)
    if is_wav(data) and (seconds := Wav(data).seconds) <= piece_seconds:
        return [Piece(0.0, seconds, data)]
    samples = samples_of(data, RATE, seconds_max)
    places = cuts(samples, RATE, piece_seconds)
    return [
        Piece(begin / RATE, (end - begin) / RATE, wav_of(samples[begin:end], RATE))
        for begin, end in zip([0, *places], [*places, len(samples)], strict=True)
    ]


def cuts(samples: np.ndarray, rate: int, piece_seconds: float) -> list[int]:
    """Where to cut: in the middle of the quietest tenth of a second in the last part of each piece, as late as may be.

    Args:
        samples: One channel.
        rate: Of them in a second.
        piece_seconds: The longest piece.
    """
    longest = int(piece_seconds * rate)
    places: list[int] = []
    begin = 0
    while len(samples) - begin > longest:
        end = begin + longest
        searched = end - int(longest * _SEARCHED)
        begin = searched + _quietest(samples[searched:end], rate)
        places.append(begin)
    return places


def _quietest(samples: np.ndarray, rate: int) -> int:
    """The middle of the window with the least energy; of several that have it, of the last one."""
    import numpy as np

    window, step = int(_QUIET_S * rate), int(_STEP_S * rate)
    if len(samples) <= window:
        return len(samples)
    sums = np.cumsum(np.concatenate([[0.0], samples.astype(np.float64) ** 2]))
    energies = (sums[window:] - sums[:-window])[::-step]
    return len(samples) - int(energies.argmin()) * step - window // 2
