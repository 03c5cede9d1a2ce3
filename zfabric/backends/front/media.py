"""Addresses in messages: an engine that fetches them does so for its operator, and not for whoever asks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from zfabric.backends.front.chat import parts_of
from zfabric.errors import RequestError
from zfabric.wire.payloads import Message


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
