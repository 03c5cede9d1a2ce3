"""Sounds of chat messages: taken from the request itself, never fetched."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any, Final

from zfabric.backends.front.chat import parts_of
from zfabric.errors import RequestError
from zfabric.wire.chat import Message

#: Types of parts that are sounds.
SOUNDS: Final = ("audio", "audio_url", "input_audio")


def sounds_of(messages: Sequence[Message]) -> list[bytes]:
    """The bytes of all sounds, in order. Raises: RequestError: One is neither bytes nor a data URI."""
    parts = [part for message in messages for part in parts_of(message)]
    return [_bytes(part) for part in parts if isinstance(part, dict) and part.get("type") in SOUNDS]


def seconds_heard(extractor: Any) -> float:
    """The longest sound that a model hears at once, by its feature extractor of transformers."""
    return float(extractor.n_samples / extractor.sampling_rate)


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
