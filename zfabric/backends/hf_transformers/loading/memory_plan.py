"""How much of a device's memory each model here means to take: planned when it is loaded, and named in one place.

A cache of keys and values grows as requests come, so what a device says is free when a second model is loaded has been promised
to the first one already. Models of this host's workers therefore leave word of what they plan, and of what they have taken of it,
which the device does not call free any more, each in a file that it holds a lock on: the lock goes with the process, however that
ends.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from zfabric.errors import ConfigurationError

#: Part of the memory that is free and not promised that a cache may take after the weights are there; the rest is for
#: activations.
SHARE: Final = 0.8


@dataclass(slots=True)
class MemoryPlan:
    """What one model plans.

    Attributes:
        bytes: Of its cache.
        graphs: Of its recorded steps, as measured when they were recorded. They are of the part that `SHARE` leaves, and taken
            at once, so whoever looks later does not find them free, and they are promised to nobody.
    """

    bytes: int
    graphs: int = 0
    _file: Any = None
    _taken: int = 0

    def took(self, size: int) -> None:
        """So many bytes of it are allocated, or were: what is given back stays with the process, and is free for nobody else."""
        size = min(size, self.bytes)
        if self._file is not None and size > self._taken:
            self._taken = size
            # In one piece, over what stood there: others may read at any time.
            os.pwrite(self._file.fileno(), _figures(self.bytes, size), 0)

    def release(self) -> None:
        """The model is gone. Safe to call twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._file.name)
            self._file.close()
            self._file = None


def plan(
    device: str,
    model: str,
    free_bytes: Callable[[], int],
    *,
    least: int,
    wanted: int | None = None,
    directory: Path | None = None,
) -> MemoryPlan:
    """Plan memory of a device for a model's cache.

    Args:
        device: What tells it from all others of this host.
        model: For errors of others.
        free_bytes: Asks the device, with the model's weights there.
        least: Bytes that the model cannot do without.
        wanted: What the operator says it is to take; None for what there is.
        directory: Where plans are named; a place for all workers of this user by default.

    Raises:
        ConfigurationError: What other models do not plan already is less than the least; or no word can be left.
    """
    place = _place(directory, device)
    with _locked(place / "lock"):
        others = _others(place)
        size = wanted
        if size is None:
            left = free_bytes() - sum(one.bytes - one.taken for one in others.values())
            size = int(left * SHARE)
            if others and size < least:
                told = ", ".join(f"{name} ({one})" for name, one in sorted(others.items()))
                raise ConfigurationError(
                    f"model {model!r}: device {device} has {max(left, 0) / 2**30:.2f} GiB free beside what is planned for "
                    f"{told}; give those models and this one a --kv-tokens-max each",
                    model=model,
                    device=device,
                )
            size = max(size, 1)
        return MemoryPlan(size, _file=_name_it(place, model, size))


def _place(directory: Path | None, device: str) -> Path:
    """The directory of a device's plans. Raises: ConfigurationError: It cannot be made, or is another user's."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    root = directory or Path(tempfile.gettempdir()) / f"zfabric-memory-{user}"
    place = root / "".join([sign if sign.isalnum() else "-" for sign in device])
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise ConfigurationError(f"plans of a device's memory cannot be left in {root}, set TMPDIR: {error}") from error
    if owner != user:
        raise ConfigurationError(
            f"plans of a device's memory are to be left in {root}, which is another user's: set TMPDIR"
        )
    return place


def _name_it(place: Path, model: str, size: int) -> Any:
    """Leave word of a plan, for as long as the file that is returned is open."""
    file = tempfile.NamedTemporaryFile("w+", suffix=".plan", dir=place, delete=False, encoding="utf-8")  # noqa: SIM115
    file.write(f"{_figures(size, 0).decode()}{model}")
    file.flush()
    _lock(file, wait=False)
    return file


def _figures(planned: int, taken: int) -> bytes:
    """What a file begins with: as wide, whatever they are."""
    return f"{planned:020d} {taken:020d} ".encode()


class _Other(NamedTuple):
    """What another model plans, and has of it."""

    bytes: int
    taken: int

    def __str__(self) -> str:
        return f"{self.bytes / 2**30:.2f} GiB, {self.taken / 2**30:.2f} GiB of it taken"


def _others(place: Path) -> dict[str, _Other]:
    """What is planned by all that live; what the dead have left is removed. Each has a name of its own."""
    found: dict[str, _Other] = {}
    for path in sorted(place.glob("*.plan")):
        with contextlib.suppress(OSError, ValueError), path.open("r+", encoding="utf-8") as file:
            if _lock(file, wait=False):
                path.unlink()
                continue
            size, taken, model = file.read().split(" ", 2)
            name = model if model not in found else f"{model} {path.stem}"
            found[name] = _Other(int(size), int(taken))
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a", encoding="utf-8") as file:
        _lock(file, wait=True)
        yield


def _lock(file: Any, *, wait: bool) -> bool:
    """Take the lock of an open file, which goes when that is closed. False if somebody else has it."""
    try:
        import fcntl
    except ImportError:
        # Without such locks plans of other processes are not known.
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
