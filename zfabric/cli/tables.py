"""Rows for people, or the same rows as JSON for programs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zfabric.limits import WATCH_S_MIN

Column = tuple[str, Callable[[Any], object]]


def show(rows: Sequence[Any], columns: Sequence[Column], *, as_json: bool, empty: str) -> None:
    """Print rows: as a table of the columns, or whole as JSON."""
    if as_json:
        print_json(rows)
        return
    console = Console()
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, header_style="bold")
    for name, value in columns:
        numeric = isinstance(value(rows[0]), (int, float))
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name == "name")
    for row in rows:
        # What stands in brackets is a name, and no style.
        table.add_row(*(escape(_cell(value(row))) for _, value in columns))
    console.print(table)


def again_and_again(once: Callable[[], None], every_s: float | None) -> None:
    """Show something, and where somebody watches show it anew after so many seconds, until Ctrl-C, which is no failure."""
    once()
    if every_s is None:
        return
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(max(every_s, WATCH_S_MIN))
            if console.is_terminal:
                console.clear()
            once()


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    text = json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False)
    print(text, flush=True)  # noqa: T201


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return "" if value is None else str(value)
