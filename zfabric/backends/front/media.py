"""Addresses in messages: an engine that fetches them does so for its operator, and not for whoever asks."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from zfabric.backends.front.chat import is_image, parts_of
from zfabric.errors import RequestError
from zfabric.wire.chat import Message

#: How the bytes of images begin.
_FORMATS: Final = (
    (b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"BM", "bmp"),
)  # fmt: skip


def with_addresses(messages: Sequence[Message]) -> list[Message]:
    """Messages as OpenAI's API has them: images are addresses, also those that are bytes, and nothing else is.

    Raises:
        RequestError: An image is neither bytes nor a text, or bytes stand where no image is.
    """
    return [
        {**message, "content": [_with_address(part) for part in parts_of(message)]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _with_address(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    value = part.get("image", part.get("image_url"))
    if isinstance(value, dict):
        value = value.get("url")
    if part.get("type") == "image" or (is_image(part) and isinstance(value, bytes)):
        if isinstance(value, bytes):
            kind = next((name for begin, name in _FORMATS if value.startswith(begin)), "png")
            value = f"data:image/{kind};base64,{base64.b64encode(value).decode('ascii')}"
        if not isinstance(value, str):
            raise RequestError(f"an image is {type(value).__name__}, it must be bytes or an address")
        return {"type": "image_url", "image_url": {"url": value}}
    if any(isinstance(found, bytes) for found in part.values()):
        raise RequestError(f"a part of type {part.get('type')!r} holds bytes, which an image alone may")
    return part


def refuse_addresses(messages: Sequence[Message], domains: Collection[str]) -> None:
    """Let nothing be fetched but from these domains: what comes along in the message itself needs no address.

    Raises:
        RequestError: A part names another.
    """
    for message in messages:
        for part in parts_of(message):
            for address in _addresses(part):
                if address[:5].lower() == "data:":
                    continue
                host = _host(address)
                if host is not None and host not in domains:
                    raise RequestError(
                        f"an address of a message is at {host!r}, which is not one of --allowed-media-domains; send the "
                        f"bytes or a data URI",
                        host=host,
                    )


def _host(address: str) -> str | None:
    """Where an address would be fetched from; None if it is none of a network."""
    # Browsers' and libraries' parsers take a backslash for a slash, and leave blanks out.
    plain = "".join(address.split()).replace("\\", "/")
    try:
        found = urlsplit(plain)
    except ValueError:
        return plain
    if found.scheme.lower() == "file" or not (found.scheme or found.netloc):
        return None
    return (found.hostname or plain).lower()


def _addresses(part: Any) -> Iterator[str]:
    """All texts of a part that may be addresses: whatever its keys are, but its text."""
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if isinstance(value, dict):
            yield from _addresses(value)
        elif isinstance(value, str) and (key == "url" or key.endswith("_url") or key in {"image", "audio", "video"}):
            yield value
