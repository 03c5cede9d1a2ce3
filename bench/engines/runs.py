"""One measurement of a system at some concurrency, and the form in which many are printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Run:
    """One measurement."""

    tokens_per_second: float
    ttft_ms_p50: float


def results(runs: Mapping[tuple[str, int], Sequence[Run]]) -> list[dict[str, Any]]:
    """Medians over the rounds of each system and concurrency, and the rounds themselves."""
    return [
        {
            "system": name,
            "streams": streams,
            "tokens_per_second": round(statistics.median(run.tokens_per_second for run in found), 1),
            "ttft_ms_p50": round(statistics.median(run.ttft_ms_p50 for run in found), 3),
            "runs": [round(run.tokens_per_second, 2) for run in found],
            "ttft_ms_runs": [round(run.ttft_ms_p50, 3) for run in found],
        }
        for (name, streams), found in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
