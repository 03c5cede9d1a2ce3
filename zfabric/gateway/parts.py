"""Parts of messages, as OpenAI's chats and the fabric have them."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from zfabric.errors import UnsupportedParameterError


def text_part(text: str) -> dict[str, Any]:
    """A text."""
    return {"type": "text", "text": text}


def image_part(url: str) -> dict[str, Any]:
    """A picture: a data URI; what is none is refused where pictures are read."""
    return {"type": "image_url", "image_url": {"url": url}}


def refuse_unknown(item: dict[str, Any], known: Set[str], where: str) -> None:
    """Refuse by name what an item has beside the known; null is what SDKs send of all that they know.

    Raises:
        UnsupportedParameterError: With the first of them.
    """
    for name, value in item.items():
        if name not in known and value is not None:
            raise UnsupportedParameterError(
                f"{where}.{name} is not a parameter of {item.get('type', 'a message')!r}", parameter=f"{where}.{name}"
            )
