"""What else is run with the model, between two steps of the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Jobs:
    """Functions in order of arrival. Any thread may put one in; the engine's thread runs them."""

    def __init__(self) -> None:
        self._line: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._line)

    def put(self, job: Callable[[], Any]) -> Future[Any]:
        """Have a function run; its result or its error is that of the future."""
        future: Future[Any] = Future()
        self._line.append((job, future))
        return future

    def run_one(self) -> None:
        """Run the first, unless nobody waits for it any more."""
        job, future = self._line.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except BaseException as error:  # noqa: BLE001 — handed to whoever waits for the job
            future.set_exception(error)

    def end(self, error: Exception) -> None:
        """Fail all that are left."""
        line, self._line = self._line, deque()
        for _, future in line:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
