"""The last minutes of a controller, a sample a second, for plots."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from msgspec import Struct

from zfabric.core.controller.broker import Broker
from zfabric.limits import HISTORY_SAMPLES, TOP_INTERVAL_S


class Sample(Struct, frozen=True):
    """One moment.

    Attributes:
        at: Seconds since 1970.
        running: Requests that hold a slot of a worker.
        queued: Requests that wait.
        requests: Requests that ended without an error, a second, since the sample before.
        failures: Requests that failed, were refused, or passed their deadline, a second.
        tokens: Tokens that all workers draw, a second, as they say.
    """

    at: float
    running: int
    queued: int
    requests: float
    failures: float
    tokens: float


class History:
    """Takes samples on the running loop until it is stopped."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._samples: deque[Sample] = deque(maxlen=HISTORY_SAMPLES)
        self._loop = asyncio.get_running_loop()
        self._at, self._ended = self._loop.time(), self._totals()
        self._timer = self._loop.call_later(TOP_INTERVAL_S, self._again)

    def since(self, at: float) -> list[Sample]:
        """Samples that were taken after a time, oldest first."""
        return [sample for sample in self._samples if sample.at > at]

    def take(self) -> Sample:
        """A sample of now."""
        now, ended = self._loop.time(), self._totals()
        passed_s = max(now - self._at, 1e-3)
        registry = self._broker.registry
        sample = Sample(
            at=time.time(),
            running=sum(worker.in_flight for worker in registry.workers.values()),
            queued=sum(len(model.queue) for model in registry.models.values()),
            requests=(ended[0] - self._ended[0]) / passed_s,
            failures=(ended[1] - self._ended[1]) / passed_s,
            tokens=sum(worker.load.tokens_per_second for worker in registry.workers.values()),
        )
        self._at, self._ended = now, ended
        self._samples.append(sample)
        return sample

    def stop(self) -> None:
        """No more samples. Safe to call twice."""
        self._timer.cancel()

    def _again(self) -> None:
        self.take()
        self._timer = self._loop.call_later(TOP_INTERVAL_S, self._again)

    def _totals(self) -> tuple[int, int]:
        figures = self._broker.scheduler.figures
        return figures.total("completed"), figures.total("failed") + figures.total("rejected") + figures.total(
            "expired"
        )
