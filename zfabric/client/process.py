"""Whose process an object belongs to: after a fork the child has copies of clients and streams, and may use none of them.

Their sockets, threads and locks are the parent's. A lock may have been held in the moment of the fork, so the question is
answered without one: every fork makes a new `here` in the child.
"""

from __future__ import annotations

import os

from zfabric.errors import ClosedError


class Process:
    """This process, until it forks."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = os.getpid()


#: Compare with `is`: an object that has kept another one was made before a fork.
here = Process()


def check(home: Process) -> None:
    """Raises: ClosedError if an object that was made at `home` is used elsewhere."""
    if home is not here:
        raise left(home)


def left(home: Process) -> ClosedError:
    """What to raise if so."""
    return ClosedError(f"the client belongs to process {home.number}; make a new one after a fork", process=home.number)


def _forked() -> None:
    global here
    here = Process()


# Not every system forks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
