"""zfabric's echo engine, which also writes the time of each abort to the file that ``ECHO_ABORTS`` names."""

from __future__ import annotations

import os
import time

from zfabric.backends.echo import EchoWorker


class ClockedEcho(EchoWorker):
    """Echo with a clock."""

    def abort(self, request_id: str) -> None:
        now_ns = time.monotonic_ns()
        super().abort(request_id)
        with open(os.environ["ECHO_ABORTS"], "a", encoding="ascii") as file:
            file.write(f"{now_ns}\n")
