"""A table that draws the rows in sight and no others, so that a thousand of them cost what twenty do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from zfabric.top.tables import Column, Order, Table, cell

_HEAD = Style(bold=True)
_CHOSEN = Style(reverse=True)
_DIM = Style(dim=True)
_STATES = {"ready": Style(color="green"), "draining": Style(color="yellow"), "stalled": Style(color="red", bold=True)}


class Rows(Widget, can_focus=True):
    """One table. The chosen row stays chosen where it moves to, until it is gone."""

    BINDINGS = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "move(-10)", show=False),
        Binding("pagedown", "move(10)", show=False),
        Binding("home", "move(-1000000)", show=False),
        Binding("end", "move(1000000)", show=False),
    ]

    class Chosen(Message):
        """Another row is chosen, or the chosen one has changed."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.order = Order(*table.order)
        self._all: Sequence[Any] = ()
        self._rows: list[Any] = []
        self._chosen = ""
        #: Place of the uppermost row in sight.
        self._top = 0

    @property
    def chosen(self) -> Any | None:
        """The row that keys act on."""
        place = self._place()
        return self._rows[place] if place is not None else None

    def show(self, rows: Sequence[Any]) -> None:
        """Show other rows."""
        self._all = rows
        self.reorder()

    def reorder(self) -> None:
        """Take account of a changed order."""
        self._rows = self.order.of(self.table, self._all)
        if self._place() is None:
            self._chosen = self.table.key(self._rows[0]) if self._rows else ""
        self._bring_in_sight()
        self.refresh()

    def action_move(self, by: int) -> None:
        """Choose another row, and bring it in sight."""
        if self._rows:
            place = max(0, min(len(self._rows) - 1, (self._place() or 0) + by))
            self._chosen = self.table.key(self._rows[place])
            self._bring_in_sight()
            self.refresh()
            self.post_message(self.Chosen())

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """As the key."""
        self.action_move(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """As the key."""
        self.action_move(-3)

    def on_click(self, event: events.Click) -> None:
        """A click chooses a row."""
        self.action_move(self._top + event.y - 1 - (self._place() or 0))

    def on_resize(self, event: events.Resize) -> None:
        """The chosen row stays in sight."""
        self._bring_in_sight()

    def render_line(self, y: int) -> Strip:
        """One line: the titles, a row, or at the bottom how much of the rows is in sight."""
        if y == 0:
            return self._line([self._title(number) for number in range(len(self.table.columns))], _HEAD)
        place = self._top + y - 1
        if y == self.size.height - 1:
            return self._text(self._counted(), _DIM)
        if place >= len(self._rows):
            return self._text(self.table.empty if y == 1 and not self._all else "", Style())
        row = self._rows[place]
        style = _STATES.get(getattr(row, "state", ""), Style())
        if self.table.key(row) == self._chosen:
            style += _CHOSEN
        return self._line([cell(column.value(row)) for column in self.table.columns], style)

    def _bring_in_sight(self) -> None:
        room = self._room
        place = self._place() or 0
        self._top = max(place - room + 1, min(self._top, place))
        self._top = max(0, min(self._top, len(self._rows) - room))

    @property
    def _room(self) -> int:
        """Lines for rows."""
        return max(1, self.size.height - 2)

    def _counted(self) -> str:
        if not self._rows and not self.order.wanted:
            return ""
        last = min(len(self._rows), self._top + self._room)
        of = f"{self._top + 1 if self._rows else 0:,}–{last:,} of {len(self._rows):,}"
        return of + (f" with {self.order.wanted!r}, of {len(self._all):,}" if self.order.wanted else "")

    def _text(self, text: str, style: Style) -> Strip:
        style = self.rich_style + style
        return Strip([Segment(text[: self.size.width], style)]).adjust_cell_length(self.size.width, style)

    def _place(self) -> int | None:
        for place, row in enumerate(self._rows):
            if self.table.key(row) == self._chosen:
                return place
        return None

    def _title(self, number: int) -> str:
        title = self.table.columns[number].title
        if number != self.order.column:
            return title
        return f"{title}{'▼' if self.order.descending else '▲'}"

    def _line(self, texts: Sequence[str], style: Style) -> Strip:
        parts = [_fitted(text, *size) for text, size in zip(texts, self._sizes(), strict=True)]
        style = self.rich_style + style
        return Strip([Segment("".join(parts), style)]).adjust_cell_length(self.size.width, style)

    def _sizes(self) -> list[tuple[int, bool]]:
        """Width of each column, and whether its texts stand at its left."""
        fixed = sum(column.width for column in self.table.columns)
        rest = max(8, self.size.width - fixed)
        return [(column.width or rest, _is_text(column)) for column in self.table.columns]


def _is_text(column: Column) -> bool:
    return not column.width or column.title in ("state", "client", "model", "worker")


def _fitted(text: str, width: int, left: bool) -> str:
    room = width - 1
    if len(text) > room:
        text = text[: room - 1] + "…" if room > 1 else text[:room]
    return f"{text:<{room}} " if left else f"{text:>{room}} "
