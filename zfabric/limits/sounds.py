"""Bounds of sounds that are written down."""

from __future__ import annotations

from typing import Final

#: A file of a sound that is written down: OpenAI's own bound.
SOUND_BYTES_MAX: Final = 25 * 1024 * 1024
#: How long it is, in seconds: what so many bytes of an MP3 of 128 kbit/s hold, to the full half hour. As samples it takes 115 MB,
#: however little of it the file was; it becomes some 60 pieces for Whisper.
SOUND_SECONDS_MAX: Final = 1_800
#: Sounds that one process of a gateway decodes at the same time, each of which takes a processor and 240 MB; others wait.
SOUNDS_DECODED_AT_ONCE: Final = 2
