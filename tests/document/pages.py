"""The pages, and the blocks of them that are generated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.document import conversation, fields, holdings, metrics, permissions, states, tables
from zfabric.wire.kinds import MINOR_VERSION, PROTOCOL_VERSION

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = (
    ROOT / "docs" / "backends.md",
    ROOT / "docs" / "fleet.md",
    ROOT / "docs" / "limits-of-peers.md",
    ROOT / "docs" / "operating.md",
    ROOT / "docs" / "protocol.md",
    ROOT / "docs" / "security.md",
    *sorted((ROOT / "docs" / "protocol").glob("*.md")),
)

_BLOCK: Final = re.compile(r"<!-- generated: (?P<name>[^>]+?) -->\n.*?<!-- end -->", re.DOTALL)

#: What a block is made by; the word after its name is the argument.
_MAKERS: Final[dict[str, Callable[[str], str]]] = {
    "fields": fields.table_of,
    "fleet-file": lambda _: tables.fleet_file_table(),
    "version": lambda _: f"This is version {PROTOCOL_VERSION} of the protocol, minor version {MINOR_VERSION}.",
    "kinds": lambda _: tables.kinds_table(),
    "errors": lambda _: tables.errors_table(),
    "holdings": holdings.holdings_table,
    "bounds": lambda _: tables.bounds_table(),
    "timings": lambda _: tables.timings_table(),
    "promises": lambda _: tables.promises_list(),
    "metrics": lambda _: metrics.table_of_all(),
    "recorded-events": lambda _: tables.recorded_events_table(),
    "permissions": lambda _: permissions.permissions_table(),
    "log-events": lambda _: tables.log_events_table(),
    "request-states": lambda _: tables.states_table(),
    "diagram": states.diagram,
    "request-events": lambda _: tables.events_table(),
    "request-transitions": lambda _: tables.transitions_table(),
    "conversation": lambda _: conversation.as_text(),
}


def names_in(page: str) -> list[str]:
    """The blocks of a page, in order."""
    return [match["name"] for match in _BLOCK.finditer(page)]


def rendered(page: str) -> str:
    """A page with its blocks as the code has them now."""

    def replaced(match: re.Match[str]) -> str:
        maker, _, argument = match["name"].partition(" ")
        return f"<!-- generated: {match['name']} -->\n\n{_MAKERS[maker](argument)}\n\n<!-- end -->"

    return _BLOCK.sub(replaced, page)
