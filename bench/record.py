"""What a scenario reports: metrics with goals, tables, and figures for the plots. Plain data, kept as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

Better = Literal["higher", "lower"]
#: Version of the files' form.
SCHEMA: Final = 1


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: Scenario and quantity, unit last.
        value: The median of `rounds`.
        goal: What it should at least (or at most) be, None for a figure without one.
        reference: What it is compared with, or where the goal is from.
        rounds: The value in each round.
    """

    name: str
    value: float
    unit: str
    better: Better
    goal: float | None = None
    reference: str = ""
    rounds: list[float] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether the goal is reached; a figure without one has nothing to miss."""
        if self.goal is None:
            return True
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal


@dataclass(frozen=True)
class Table:
    """Rows for people."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Plot:
    """Lines of points; `kind` "distribution" has sorted samples instead, drawn as percentiles."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    kind: Literal["lines", "distribution"] = "lines"


@dataclass
class Report:
    """All that one scenario found."""

    name: str
    title: str
    metrics: list[Metric] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def metric(
        self,
        name: str,
        rounds: Sequence[float],
        unit: str,
        better: Better,
        *,
        goal: float | None = None,
        reference: str = "",
    ) -> None:
        """Add a figure: the median of its rounds."""
        value = statistics.median(rounds)
        self.metrics.append(Metric(f"{self.name}.{name}", value, unit, better, goal, reference, list(rounds)))


def write(path: Path, environment: dict[str, Any], reports: Sequence[Report]) -> None:
    """Write a run's full results, and beside it the flat map of its metrics, `latest.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scenarios = [{**asdict(report), "metrics": [_flat(metric) for metric in report.metrics]} for report in reports]
    document = {"schema": SCHEMA, "environment": environment, "scenarios": scenarios}
    path.write_text(json.dumps(document, indent=1) + "\n")
    metrics = {metric.name: _flat(metric) for report in reports for metric in report.metrics}
    for entry in metrics.values():
        del entry["name"]
        del entry["rounds"]
    latest = {"schema": SCHEMA, "results": path.name, "environment": environment, "metrics": metrics}
    (path.parent / "latest.json").write_text(json.dumps(latest, indent=1) + "\n")


def _flat(metric: Metric) -> dict[str, Any]:
    entry = asdict(metric)
    entry["value"] = _rounded(metric.value)
    entry["rounds"] = [_rounded(value) for value in metric.rounds]
    entry["met"] = metric.met
    return entry


def _rounded(value: float) -> float:
    """Five significant digits: more would claim what no run can hold."""
    return float(f"{value:.5g}")
