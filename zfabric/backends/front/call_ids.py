"""Names of tool calls where the engine gives none: the same whoever goes on with the answer."""

from __future__ import annotations

import hashlib


def call_id(request_id: str, choice: int, number: int, length: int | None = None) -> str:
    """The id of a call.

    Args:
        request_id: As the fabric names an attempt; all attempts of a request have the same ids.
        choice: Which of the answer's choices.
        number: Which of the choice's calls.
        length: For models whose chat templates take ids of that length alone, of letters and digits; at most 24.

    Example:
        >>> call_id("5f-77-0", 0, 1) == call_id("5f-77-1", 0, 1)
        True
    """
    request = request_id.rpartition("-")[0]
    drawn = hashlib.blake2b(f"{request}/{choice}/{number}".encode(), digest_size=12).hexdigest()
    return f"call_{drawn}" if length is None else drawn[:length]
