"""Parts of messages, as OpenAI's chats and the fabric have them."""

from __future__ import annotations

from typing import Any


def text_part(text: str) -> dict[str, Any]:
    """A text."""
    return {"type": "text", "text": text}


def image_part(url: str) -> dict[str, Any]:
    """A picture: a data URI; what is none is refused where pictures are read."""
    return {"type": "image_url", "image_url": {"url": url}}
