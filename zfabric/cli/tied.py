"""Becomes another program, whose process group ends with the process that started it, however that ends.

Run as a file of its own before that program. It leaves a watcher in the group, which reads a pipe whose other end only the
supervisor has: the pipe ends when the supervisor does, and then the watcher kills the group. That takes along what the program
itself has started, such as an engine that holds a GPU, which a signal for the program alone would leave behind.
"""

from __future__ import annotations

import os
import signal
import sys


def main(lifeline: int, command: list[str]) -> None:
    """Become a command, with a watcher beside it. Args: lifeline: The descriptor of the pipe."""
    if os.fork() == 0:
        # The watcher is nobody's child, so that the program has none that it knows nothing of.
        if os.fork() == 0:
            _watch(lifeline)
        os._exit(0)
    os.wait()
    os.close(lifeline)
    os.execv(command[0], command)


def _watch(lifeline: int) -> None:
    """Kill this process group as soon as the pipe ends."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    while os.read(lifeline, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
