"""The chat page at /: one file without anything from elsewhere, a program on this API as any other."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources
from typing import Final

_PARTS: Final = {"script-src": re.compile(rb"<script>(.*?)</script>", re.DOTALL),
                 "style-src": re.compile(rb"<style>(.*?)</style>", re.DOTALL)}  # fmt: skip
#: Nobody may frame it, since a key is typed into it; it may talk to this gateway alone.
_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def chat_page() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The page, and headers that let a browser run what stands in it and nothing else
    (https://www.w3.org/TR/CSP3/)."""
    page = (resources.files("zfabric.gateway") / "chat.html").read_bytes()
    policy = [_POLICY]
    for directive, pattern in _PARTS.items():
        hashes = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in pattern.findall(page))
        policy.append(" ".join((directive, *(f"'sha256-{digest}'" for digest in hashes))))
    return page, [
        (b"content-security-policy", "; ".join(policy).encode()),
        (b"cache-control", b"no-cache"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]
