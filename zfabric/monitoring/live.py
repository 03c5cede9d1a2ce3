"""What the page of live figures shows, as one JSON document."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import msgspec

from zfabric.controller.service import Controller
from zfabric.core.controller.listings import queue
from zfabric.core.controller.status import fabric_status, model_status, worker_status
from zfabric.limits import LIVE_ROWS_MAX, LIVE_SLICE_ROWS
from zfabric.monitoring.history import History

#: Figures of the transport are for metrics; the page has no place for them.
_LEFT_OUT = ("transport",)


class LiveView:
    """A controller as a page shows it. Make it on the loop of the controller, which is the one that calls it.

    Example:
        >>> view = LiveView(controller)
        >>> msgspec.json.decode(await view.document(0.0))["status"]["queued"]
        0
    """

    def __init__(self, controller: Controller) -> None:
        self._broker = controller.broker
        self._history = History(controller.broker)

    async def document(self, since: float) -> bytes:
        """All that is shown, with the samples that were taken after a time in seconds since 1970.

        Rows are gathered some at a time, so that a thousand workers hold up nobody.
        """
        registry = self._broker.registry
        served = [model for model in registry.models.values() if model.hosts]
        status = msgspec.to_builtins(fabric_status(self._broker))
        waiting = queue(self._broker, None, {})
        return msgspec.json.encode(
            {
                "status": {name: value for name, value in status.items() if name not in _LEFT_OUT},
                "models": await _rows(served, lambda model: model_status(registry, model)),
                "queue": msgspec.to_builtins(waiting.rows),
                "workers": await _rows(registry.workers.values(), lambda worker: worker_status(self._broker, worker)),
                "left_out": {
                    "models": max(0, len(served) - LIVE_ROWS_MAX),
                    "queue": waiting.left_out,
                    "workers": max(0, len(registry.workers) - LIVE_ROWS_MAX),
                },
                "history": self._history.since(since),
            }
        )

    def close(self) -> None:
        """Take no more samples. Safe to call twice."""
        self._history.stop()


async def _rows(of: Iterable[Any], row: Callable[[Any], Any]) -> list[Any]:
    made: list[Any] = []
    for number, subject in enumerate(list(islice(of, LIVE_ROWS_MAX)), 1):
        made.append(row(subject))
        if not number % LIVE_SLICE_ROWS:
            await asyncio.sleep(0)
    return made
