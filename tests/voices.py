"""Sounds for tests."""

from __future__ import annotations

import io
import wave
from typing import Any

import av
import numpy as np

RATE = 16_000


def voice(seed: int, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    """Something that changes all the time, between -1 and 1, of tones that any rate here has."""
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * random.uniform(100, 3_000) * times + random.uniform(0, 6)) for _ in range(5)]
    return np.asarray(sum(tones) / 5 * (0.5 + 0.5 * np.sin(7 * times + seed)), dtype=np.float64)


def wav(samples: np.ndarray, rate: int = RATE, width: int = 2, channels: int = 1) -> bytes:
    """A WAV of whole numbers, each channel the same."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(rate)
        top = 2 ** (8 * width - 1) - 1
        whole = np.round(np.repeat(samples, channels) * top).astype("<i8")
        if width == 1:
            writer.writeframes((whole + 128).astype(np.uint8).tobytes())
        else:
            writer.writeframes(whole.view(np.uint8).reshape(-1, 8)[:, :width].tobytes())
    return file.getvalue()


def coded(samples: np.ndarray, rate: int, container: str, codec: str, channels: int = 1) -> bytes:
    """A file of another format; all channels but the first are silent."""
    file = io.BytesIO()
    layout = "mono" if channels == 1 else "stereo"
    with av.open(file, "w", format=container) as made:
        stream: Any = made.add_stream(codec, rate=rate)
        stream.layout, stream.bit_rate = layout, 192_000
        every = np.zeros((channels, len(samples)), dtype=np.float32)
        every[0] = samples
        frame = av.AudioFrame.from_ndarray(every, format="fltp", layout=layout)
        frame.sample_rate = rate
        for one in (frame, None):
            made.mux(stream.encode(one))
    return file.getvalue()
