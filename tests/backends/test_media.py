"""Whoever asks cannot have a worker fetch what it likes."""

from __future__ import annotations

from typing import Any

import pytest

from zfabric.backends.front.media import refuse_addresses
from zfabric.errors import RequestError

INNER = "http://169.254.169.254/latest/meta-data"


def said(part: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": INNER}, part]}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": INNER}},
        {"type": "image_url", "image_url": INNER},
        {"image_url": INNER},
        {"type": "input_image", "image_url": INNER.upper()},
        {"type": "image", "image": INNER},
        {"type": "video_url", "video_url": {"url": "https://localhost:9/x"}},
        {"type": "audio_url", "audio_url": {"url": "ftp://inner/x"}},
        {"type": "image_url", "image_url": {"url": " http:\\\\169.254.169.254/"}},
        {"type": "image_url", "image_url": {"url": "//inner/x"}},
        {"type": "image_url", "image_url": {"url": "http://good.example@169.254.169.254/"}},
        {"type": "image_url", "image_url": {"url": "http://[::1/"}},
        {"type": "image_url", "image_url": {"url": "http://good.example.evil.example/"}},
    ],
)
def test_addresses_of_other_domains_are_refused(part: dict[str, Any]) -> None:
    for domains in ((), ("good.example",)):
        with pytest.raises(RequestError, match="allowed-media-domains"):
            refuse_addresses(said(part), domains)


def test_what_comes_along_or_is_allowed_passes() -> None:
    for part in (
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
        {"type": "image", "image": b"bytes"},
        {"type": "image_url", "image_url": {"url": "https://GOOD.example/cat.png"}},
        "a text with http://inner/x",
    ):
        refuse_addresses(said(part), ("good.example",))
    refuse_addresses([{"role": "user", "content": INNER}], ())
