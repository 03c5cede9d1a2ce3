"""Two runs beside each other: what changed by more than their own noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

#: A change is only told from noise if the rounds of both runs do not overlap and it is at least this large.
_CHANGE_MIN: Final = 0.05

Verdict = Literal["better", "worse", "within noise"]


@dataclass(frozen=True)
class Change:
    """One metric in both runs; `ratio` is the second over the first."""

    name: str
    before: float
    after: float
    unit: str
    ratio: float
    verdict: Verdict


def load(path: Path) -> dict[str, dict[str, Any]]:
    """The metrics of a full result file, by name.

    Raises:
        ValueError: It is none.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if "scenarios" not in document:
        raise ValueError(f"{path} holds no rounds: give a full result file, not latest.json")
    return {metric["name"]: metric for scenario in document["scenarios"] for metric in scenario["metrics"]}


def compare(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[Change]:
    """All metrics that both have, the worst first."""
    changes = [_change(name, before[name], after[name]) for name in before if name in after]
    order = {"worse": 0, "better": 1, "within noise": 2}
    return sorted(changes, key=lambda change: (order[change.verdict], change.name))


def _change(name: str, before: dict[str, Any], after: dict[str, Any]) -> Change:
    old, new = before["value"], after["value"]
    ratio = new / old if old else float("inf") if new else 1.0
    verdict: Verdict = "within noise"
    if abs(ratio - 1) >= _CHANGE_MIN and _apart(before["rounds"], after["rounds"]):
        verdict = "better" if (ratio > 1) == (after["better"] == "higher") else "worse"
    return Change(name, old, new, after["unit"], ratio, verdict)


def _apart(first: list[float], second: list[float]) -> bool:
    """Whether two sets of rounds do not overlap. A single round knows nothing of its noise: then a tenth stands for it."""
    ranges = [(min(r) * 0.9, max(r) * 1.1) if len(r) == 1 else (min(r), max(r)) for r in (first, second)]
    return ranges[0][1] < ranges[1][0] or ranges[1][1] < ranges[0][0]
