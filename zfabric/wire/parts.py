"""Parts of chat messages that are no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: Types of parts that are images.
IMAGES: Final = ("image", "image_url", "input_image")
#: Types of parts that only a model which sees or hears can make something of.
MEDIA: Final = (*IMAGES, "audio", "audio_url", "input_audio", "video", "video_url", "input_video")


def has_media(message: Mapping[str, Any]) -> str | None:
    """The type of the first part of a message that is no text; None if all of it is.

    Example:
        >>> has_media({"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": b""}]})
        'image'
    """
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and part.get("type") in MEDIA:
                return str(part["type"])
    return None
