"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells may hold anything that is on one line."""
    lines = [_line(head), "|" + "---|" * len(head)]
    lines += [_line(row) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def power(number: int) -> str:
    """A bound as people write it."""
    for offset in (0, 1):
        value = number + offset
        if value > 2**16 and value & (value - 1) == 0:
            return f"2^{value.bit_length() - 1}" + (" - 1" if offset else "")
    if number < 0 and (text := power(-number)).startswith("2^"):
        return f"-{text}"
    return f"{number:,}"
