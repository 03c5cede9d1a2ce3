"""Becomes another program, which the kernel kills as soon as the process that started it is gone.

Run as a file of its own before that program: a child could not ask for this of the kernel between fork and exec without Python
code there, which may hang where the parent has threads. It survives the exec, and needs nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

#: prctl(2).
_PR_SET_PDEATHSIG: Final = 1


def main(parent: int, command: list[str]) -> None:
    """Become a command that dies with a parent. Args: parent: Its process id, since it may be gone by now."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() == parent:
        os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
