"""Which web pages may call from a browser (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_METHODS: Final = b"GET, POST, OPTIONS"
#: How long a browser may keep the answer, in seconds: a day is what browsers keep at most.
_MAX_AGE: Final = b"86400"


class Cors:
    """Origins that may call. Without any, no response says a word of it, and browsers keep pages out.

    Args:
        origins: Such as "https://chat.example.org"; "*" is all.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._all = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def allows(self, origin: bytes) -> bool:
        """Whether pages of this origin may call."""
        return self._all or origin in self._origins

    def headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """Of every response to this origin."""
        if not self.allows(origin):
            return []
        return [
            (b"access-control-allow-origin", b"*" if self._all else origin),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"Origin"),
        ]

    def preflight(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """Of the response to a browser that asks first, beside `headers`."""
        if not self.allows(headers[b"origin"]):
            return []
        wanted = headers.get(b"access-control-request-headers", b"authorization, content-type")
        return [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", _MAX_AGE),
        ]
