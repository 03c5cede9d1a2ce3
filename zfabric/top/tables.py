"""The tables of the live view: which columns they have, and which rows in what order. Nothing here knows of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from zfabric.wire.status import ModelStatus, WorkerStatus


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: What stands above it.
        value: Of a row: what is shown, and what rows are ordered by.
        width: Characters; 0 takes what the others leave.
    """

    title: str
    value: Callable[[Any], str | float]
    width: int = 9


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        title: Its name.
        key: What a row is known by, from one look to the next.
        columns: From left to right; the first is wide.
        empty: What is said where there are no rows.
        order: The column that rows are ordered by at first, from 0, and whether the greatest is first.
    """

    title: str
    key: Callable[[Any], str]
    columns: Sequence[Column]
    empty: str
    order: tuple[int, bool] = (0, False)


@dataclass(slots=True)
class Order:
    """How a table is ordered, and what of it is shown.

    Attributes:
        column: The column that decides, from 0.
        descending: The greatest first.
        wanted: What a row has to have somewhere in its texts, in any case; "" for all rows.
    """

    column: int = 0
    descending: bool = False
    wanted: str = ""

    def next_column(self, table: Table) -> None:
        """Order by the column after this one: names from A, numbers from the greatest."""
        self.column = (self.column + 1) % len(table.columns)
        self.descending = self.column > 0

    def of(self, table: Table, rows: Sequence[Any]) -> list[Any]:
        """The rows that are wanted, in order; equal ones by their key."""
        column = table.columns[self.column]
        found = [row for row in rows if self.wanted in shown(table, row)] if self.wanted else list(rows)
        found.sort(key=table.key)
        found.sort(key=lambda row: _order(column.value(row)), reverse=self.descending)
        return found


def shown(table: Table, row: Any) -> str:
    """All texts of a row in small letters."""
    return " ".join(cell(column.value(row)) for column in table.columns).lower()


def cell(value: str | float) -> str:
    """A value as it is shown.

    Example:
        >>> cell(12_345.678), cell(3)
        ('12,345.7', '3')
    """
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(5), duration(125), duration(7_500), duration(200_000)
        ('5s', '2m05s', '2h05m', '2d07h')
    """
    whole = int(seconds)
    for unit, above, below, name in (("d", 86_400, 3_600, "h"), ("h", 3_600, 60, "m"), ("m", 60, 1, "s")):
        if whole >= above:
            return f"{whole // above}{unit}{whole % above // below:02d}{name}"
    return f"{whole}s"


def _order(value: str | float) -> tuple[bool, float, str]:
    return (True, 0.0, value.lower()) if isinstance(value, str) else (False, value, "")


def _load(row: WorkerStatus | ModelStatus) -> float:
    return 100 * row.in_flight / row.slots if row.slots else 0.0


WORKERS: Final = Table(
    "Workers",
    lambda row: row.name,
    (
        Column("worker", lambda row: row.name, 0),
        Column("state", lambda row: row.state),
        Column("running", lambda row: row.in_flight, 8),
        Column("slots", lambda row: row.slots, 7),
        Column("load %", _load, 7),
        Column("tokens/s", lambda row: row.tokens_per_second, 11),
        Column("done", lambda row: row.finished, 9),
        Column("failed", lambda row: row.failed, 7),
        Column("silent ms", lambda row: round(row.silence_ms), 10),
    ),
    "no worker is registered: start one with zfabric-worker",
)
MODELS: Final = Table(
    "Models",
    lambda row: row.name,
    (
        Column("model", lambda row: row.name, 0),
        Column("workers", lambda row: len(row.workers), 8),
        Column("running", lambda row: row.in_flight, 8),
        Column("queued", lambda row: row.queued, 8),
        Column("slots", lambda row: row.slots, 8),
        Column("load %", _load, 7),
        Column("context", lambda row: row.context_length, 9),
    ),
    "no model is served",
)
REQUESTS: Final = Table(
    "Requests",
    lambda row: f"{row.request}/{row.attempt}",
    (
        Column("request", lambda row: row.request, 0),
        Column("client", lambda row: row.client, 11),
        Column("model", lambda row: row.model or row.asked, 11),
        Column("state", lambda row: row.state),
        Column("place", lambda row: row.place or 0, 6),
        Column("worker", lambda row: row.worker, 9),
        Column("age s", lambda row: row.age_s or 0.0, 8),
        Column("tokens", lambda row: row.units, 8),
    ),
    "no request is here",
    order=(6, True),
)
