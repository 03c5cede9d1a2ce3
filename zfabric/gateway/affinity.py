"""Which requests belong together: callers name it by a field of OpenAI's, or by the header that vllm-router goes by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from zfabric.limits import AFFINITY_LENGTH_MAX

_HEADER: Final = b"x-session-id"


def affinity_of(name: str) -> str:
    """The key of affinity for a name of any length: itself, or a hash where it is longer than keys are."""
    if len(name) <= AFFINITY_LENGTH_MAX:
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:AFFINITY_LENGTH_MAX]


def with_session(options: dict[str, Any], headers: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Options with the affinity that the header names, if it names one and the body has said none."""
    session = headers.get(_HEADER)
    if not session or "affinity" in options:
        return options
    return {**options, "affinity": affinity_of(session.decode("latin-1"))}
