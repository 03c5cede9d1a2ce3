"""Files that are read anew when they change: keys of a controller and of a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any, Generic, TypeVar

from zfabric.errors import FabricError
from zfabric.limits import KEYS_LOOK_MS

T = TypeVar("T", bound=Sized)
#: What tells two states of a file apart: a file that is moved into place has another number.
_State = tuple[int, int, int] | None


class WatchedFile(Generic[T]):
    """Looks at a file now and then, which works on every file system, and through the links of mounted secrets.

    Args:
        path: The file.
        load: Reads it. What it raises leaves the former content in force.
        take: Called with what was read; what it raises leaves the former content in force as well.
        log: Called with `keys` and how many there are, or with `keys_kept` and why.
        parts: Other files that what was read was made of; they are looked at as well.
        look: Called at each look, whether or not anything has changed: what changes with the time is done there.

    Example:
        >>> file = WatchedFile(Path("keys.toml"), read_keys, gateway.take_keys, print)
        >>> file.read()
        >>> watching = asyncio.create_task(file.watch())
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[Path], T],
        take: Callable[[T], None],
        log: Callable[..., Any],
        *,
        parts: Callable[[T], Iterable[Path]] = lambda _: (),
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._load = load
        self._take = take
        self._log = log
        self._parts = parts
        self._look = look
        self._files: tuple[Path, ...] = (path,)
        self._seen: list[_State] = []

    async def watch(self) -> None:
        """Read the file whenever it has changed, until this call is cancelled."""
        while True:
            await asyncio.sleep(KEYS_LOOK_MS / 1_000)
            if self._states() != self._seen:
                self.read()
            self._look()

    def read(self) -> None:
        """Read the file now. One that cannot be read is told of, and the former content stays in force."""
        # Looked at first: a change while it is read leads to another look.
        self._seen = self._states()
        try:
            found = self._load(self._path)
            self._take(found)
        except FabricError as error:
            self._log("keys_kept", path=str(self._path), error=error.message)
            return
        files = (self._path, *self._parts(found))
        if files != self._files:
            self._files = files
            self._seen = self._states()
        self._log("keys", path=str(self._path), keys=len(found))

    def _states(self) -> list[_State]:
        return [_state(path) for path in self._files]


def _state(path: Path) -> _State:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
