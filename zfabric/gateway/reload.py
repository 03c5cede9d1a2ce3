"""The file of API keys, read anew when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zfabric.errors import FabricError
from zfabric.gateway.keys import KeyTable, read_keys
from zfabric.limits import KEYS_LOOK_MS

#: What tells two states of a file apart: a file that is moved into place has another number.
_State = tuple[int, int, int] | None


class KeysFile:
    """Looks at a file now and then, which works on every file system, and through the links of mounted secrets.

    Args:
        path: The file.
        take: Called with what was read; what it raises leaves the former keys in force.
        log: Called with an event and its fields.
    """

    def __init__(self, path: Path, take: Callable[[KeyTable], None], log: Callable[..., Any]) -> None:
        self._path = path
        self._take = take
        self._log = log
        self._seen: _State = None

    async def watch(self) -> None:
        """Read the file whenever it has changed, until this call is cancelled."""
        while True:
            await asyncio.sleep(KEYS_LOOK_MS / 1_000)
            if self._state() != self._seen:
                self.read()

    def read(self) -> None:
        """Read the file now. One that cannot be read is told of, and the former keys stay in force."""
        # Looked at first: a change while it is read leads to another look.
        self._seen = self._state()
        try:
            keys = read_keys(self._path)
            self._take(keys)
        except FabricError as error:
            self._log("keys_kept", path=str(self._path), error=error.message)
        else:
            self._log("keys", path=str(self._path), keys=len(keys))

    def _state(self) -> _State:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
