"""What happens each second, from two looks at a controller's totals."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from zfabric.wire.status import FabricStatus, WorkerStatus

#: Of one more than a terminal of usual width has columns.
_KEPT: Final = 240


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a stretch of time between two looks.

    Attributes:
        requests: Requests that ended without an error, a second.
        failures: Requests that failed, were refused, or passed their deadline, a second.
        tokens: Tokens that all workers draw, a second, as they say.
    """

    requests: float = 0.0
    failures: float = 0.0
    tokens: float = 0.0


class History:
    """The last looks, oldest first."""

    def __init__(self) -> None:
        self.tokens: deque[float] = deque(maxlen=_KEPT)
        self.rates = Rates()
        self._before: FabricStatus | None = None

    def add(self, status: FabricStatus, workers: Sequence[WorkerStatus]) -> Rates:
        """Take another look. Returns what happened since the one before; after a restart of the controller nothing has."""
        before, self._before = self._before, status
        tokens = sum(worker.tokens_per_second for worker in workers)
        self.tokens.append(tokens)
        passed_s = status.uptime_s - before.uptime_s if before is not None and before.epoch == status.epoch else 0.0
        if before is None or passed_s <= 0:
            self.rates = Rates(tokens=tokens)
        else:
            ended, bad = status.completed - before.completed, _failures(status) - _failures(before)
            self.rates = Rates(ended / passed_s, bad / passed_s, tokens)
        return self.rates


def _failures(status: FabricStatus) -> int:
    return status.failed + status.rejected + status.expired
