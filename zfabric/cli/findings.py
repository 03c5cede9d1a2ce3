"""What a check finds, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

from zfabric.cli.tables import Column, print_json, show

Level = Literal["fine", "warning", "error"]
_COLUMNS: Final[Sequence[Column]] = (
    ("", lambda row: row.level),
    ("of", lambda row: row.of),
    ("finding", lambda row: row.what),
    ("what to do", lambda row: row.advice),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        level: Whether it keeps something from working ("error"), is not as it should be ("warning"), or is fine.
        of: What was looked at.
        what: What was found.
        advice: What to do about it; "" where nothing is to be done.
    """

    level: Level
    of: str
    what: str
    advice: str = ""


def show_findings(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print them: as a table, or as JSON."""
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        show(findings, _COLUMNS, as_json=False, empty="nothing was looked at")


def has_errors(findings: Sequence[Finding]) -> bool:
    """Whether any of them keeps something from working."""
    return any(finding.level == "error" for finding in findings)
