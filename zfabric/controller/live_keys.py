"""The keyring of a running controller: read anew when it changes, and looked at for keys that have expired."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from zfabric.controller.keyring import KeyRing
from zfabric.core.controller.access import Grant
from zfabric.errors import IncorrectKeyError
from zfabric.files import WatchedFile
from zfabric.transport.clock import unix_ns
from zfabric.transport.links import Log


class LiveKeys:
    """Which keys hold now.

    Args:
        path: The keyring.
        log: Told when it was read, or cannot be.
        changed: Called when keys may do something else than before.
        wall_clock_s: Seconds since 1970, which expiry dates are compared with.

    Raises:
        ConfigurationError: As of `KeyRing.load`; only here, a file that becomes unusable later leaves the former keys in force.
    """

    def __init__(
        self,
        path: Path,
        log: Log,
        changed: Callable[[], None],
        wall_clock_s: Callable[[], float] = lambda: unix_ns() / 1e9,
    ) -> None:
        self._changed: Final = changed
        self._wall_clock_s: Final = wall_clock_s
        self._ring = KeyRing.load(path)
        self._valid = self._ring.valid(wall_clock_s())
        self._file = WatchedFile(path, KeyRing.load, self._take, log, parts=lambda ring: ring.files, look=self._look)
        self._watching: asyncio.Task[None] | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the file from now on."""
        # It may have changed since it was looked at first, and the log is to say what holds.
        self._file.read()
        self._watching = loop.create_task(self._file.watch(), name="keyring")

    def stop(self) -> None:
        """Look no more."""
        if self._watching is not None:
            self._watching.cancel()

    def read(self) -> None:
        """Read the file now."""
        self._file.read()

    def allows(self, key: bytes) -> bool:
        """Whether a key (Z85) may connect now. Safe to call from any thread."""
        return self._ring.holds(key, self._wall_clock_s())

    def grant(self, key: bytes) -> Grant:
        """What a key allows now. Raises: IncorrectKeyError, it is not in the keyring any more, or has expired."""
        grant = self._ring.grant(key) if self.allows(key) else None
        if grant is None:
            raise IncorrectKeyError("the controller does not know this key any more: it was taken out, or has expired")
        return grant

    def _take(self, ring: KeyRing) -> None:
        self._ring = ring
        self._valid = ring.valid(self._wall_clock_s())
        self._changed()

    def _look(self) -> None:
        """Time passes: some keys may have expired."""
        valid = self._ring.valid(self._wall_clock_s())
        if valid != self._valid:
            self._valid = valid
            self._changed()
