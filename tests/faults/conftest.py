"""Faults as a table: each test adds a row, and the run ends with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields

import pytest

from tests.endpoints import endpoint, ipc, run_directory, transport

__all__ = ["endpoint", "ipc", "run_directory", "transport"]


@dataclass
class Row:
    """What one fault did.

    Attributes:
        fault: Which.
        injected: How often.
        requests: Affected by it.
        lost: Tokens or terminals that readers did not get.
        doubled: Chunks that readers got twice.
        detection_ms: From the fault to when the controller knew, where that can be seen from outside.
        recovery_ms: From the fault to the next token of the last affected stream.
    """

    fault: str
    injected: int = 1
    requests: int = 0
    lost: int = 0
    doubled: int = 0
    detection_ms: float | None = None
    recovery_ms: float | None = None


_KEY = pytest.StashKey[list[Row]]()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """This test's row; a test that fails adds none."""
    made = Row(request.node.name)
    yield made
    if made.requests:
        request.config.stash.setdefault(_KEY, []).append(made)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    rows = config.stash.get(_KEY, [])
    if not rows:
        return
    titles = [field.name.replace("_", " ") for field in fields(Row)]
    cells = [titles, *([_cell(value) for value in astuple(row)] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    terminalreporter.section("faults")
    for line in cells:
        first, *others = zip(line, widths, strict=True)
        terminalreporter.write_line(
            "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])
        )


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(value, float) else str(value)
