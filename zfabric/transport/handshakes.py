"""What a controller tells of handshakes that failed: each reason at once, and then not more often than anybody wants to read."""

from __future__ import annotations

from collections import Counter
from typing import Final

from zfabric.limits import HANDSHAKE_LOG_MS
from zfabric.transport.monitor import Happened

#: Those of which the peer's operator has to know. A connection that just ends may be a port scan, or a health check.
_REASONS: Final = {
    Happened.DENIED: "the peer's key is not in the keyring",
    Happened.WRONG_KEY: "the peer expects another controller's key",
}
_MISMATCH: Final = {True: "the peer has no key", False: "the peer has a key, this controller has none"}


class Handshakes:
    """Counts failures.

    Args:
        has_keys: Whether this controller encrypts.
    """

    def __init__(self, *, has_keys: bool) -> None:
        self.failed = 0
        self._reasons = {**_REASONS, Happened.MISMATCH: _MISMATCH[has_keys]}
        self._untold: Counter[str] = Counter()
        self._silent_until_ns: dict[str, int] = {}

    def note(self, happened: Happened) -> None:
        """A handshake failed."""
        self.failed += 1
        reason = self._reasons.get(happened)
        if reason is not None:
            self._untold[reason] += 1

    def due(self, now_ns: int) -> list[tuple[str, int]]:
        """Reasons to log now, each with how often it was met since it was logged last."""
        if not self._untold:
            return []
        told = [item for item in self._untold.items() if self._silent_until_ns.get(item[0], 0) <= now_ns]
        for reason, _ in told:
            del self._untold[reason]
            self._silent_until_ns[reason] = now_ns + HANDSHAKE_LOG_MS * 1_000_000
        return told
