"""`zfabric top`: a fabric live, in a terminal of 80 × 24 or more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import Footer, Input, Sparkline, Static, TabbedContent, TabPane

from zfabric.client.aio import AsyncClient
from zfabric.errors import FabricError
from zfabric.limits import TOP_INTERVAL_S, TOP_REQUESTS_MAX, TOP_TIMEOUT_S
from zfabric.top.rates import History
from zfabric.top.rows import Rows
from zfabric.top.tables import MODELS, REQUESTS, WORKERS, duration
from zfabric.wire.status import FabricStatus, WorkerStatus

_CSS: Final = """
#head, #figures, #said { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
#head { text-style: bold; }
#said { color: $warning; height: auto; max-height: 3; text-wrap: wrap; }
Sparkline { height: 2; margin: 0 1; }
TabbedContent { height: 1fr; }
TabPane { padding: 0; }
Rows { height: 1fr; }
#filter { height: 1; border: none; padding: 0; display: none; }
#filter.open { display: block; }
"""


class Top(App[None]):
    """The live view.

    Args:
        client: An open client. What its key may not do is said when it is tried.
        endpoint: What is shown as the place.
    """

    TITLE = "zfabric"
    CSS = _CSS
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [
        Binding("1", "table('workers')", show=False),
        Binding("2", "table('models')", show=False),
        Binding("3", "table('requests')", show=False),
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Turn"),
        Binding("slash", "filter", "Filter"),
        Binding("d", "drain", "Drain"),
        Binding("u", "undrain", "Undrain"),
        Binding("c", "cancel", "Cancel"),
        Binding("p", "pause", "Pause"),
        Binding("q,ctrl+c", "quit", "Quit"),
        Binding("y", "confirm", show=False),
        Binding("n,escape", "dismiss", show=False),
    ]

    def __init__(self, client: AsyncClient, endpoint: str) -> None:
        super().__init__()
        self._client = client
        self._endpoint = endpoint
        self._history = History()
        # Held, and not looked for: a look may end when the screen has gone.
        self._head, self._figures, self._said = (Static(id=name, markup=False) for name in ("head", "figures", "said"))
        self._bars = Sparkline(id="tokens", summary_function=max)
        self._tabs = TabbedContent(id="tabs")
        self._field = Input(id="filter", placeholder="only rows with this text; Enter keeps it, Esc clears it")
        self._tables = {"workers": Rows(WORKERS), "models": Rows(MODELS), "requests": Rows(REQUESTS)}
        self._paused = False
        #: What was said of the last key, until the next one; and why the last look failed.
        self._notice = self._trouble = ""
        #: What the operator is asked to confirm.
        self._asked: Callable[[], Awaitable[str]] | None = None

    def compose(self) -> ComposeResult:
        with Vertical():
            yield self._head
            yield self._figures
            yield self._bars
            with self._tabs:
                for key, (name, rows) in enumerate(self._tables.items(), 1):
                    with TabPane(f"{key} {rows.table.title}", id=name):
                        yield rows
            yield self._said
            yield self._field
        yield Footer()

    async def on_mount(self) -> None:
        self._rows.focus()
        self.set_interval(TOP_INTERVAL_S, self.look)
        await self.look()

    async def look(self) -> None:
        """Ask the controller, and show what it says."""
        if self._paused:
            return
        try:
            status = await self._client.status(timeout=TOP_TIMEOUT_S)
            workers = await self._client.workers(timeout=TOP_TIMEOUT_S)
            models = await self._client.models(timeout=TOP_TIMEOUT_S)
            requests = await self._client.requests(limit=TOP_REQUESTS_MAX, timeout=TOP_TIMEOUT_S)
        except FabricError as error:
            self._trouble = f"error {error.code}: {error.message}; what is shown is older"
            self._tell()
            return
        self._trouble = ""
        self._history.add(status, workers)
        self._tables["workers"].show(workers)
        self._tables["models"].show(models)
        self._tables["requests"].show(requests.rows)
        self._tell()
        self._show_figures(status, workers)

    def _show_figures(self, status: FabricStatus, workers: list[WorkerStatus]) -> None:
        stalled = sum(worker.state == "stalled" for worker in workers)
        head = [
            f"zfabric {status.version}",
            f"{len(workers):,} workers" + (f" ({stalled} stalled)" if stalled else ""),
            f"{status.clients:,} clients",
            f"up {duration(status.uptime_s)}",
            *(name for name in ("draining", "recovering") if getattr(status, name)),
            status.policy,
            self._endpoint,
        ]
        self._head.update("  ".join(head))
        rates = self._history.rates
        figures = [
            f"{status.in_flight:,} running",
            f"{status.queued:,} queued",
            f"{rates.requests:,.0f} requests/s",
            f"{rates.tokens:,.0f} tokens/s",
            f"{rates.failures:,.0f} failures/s",
        ]
        self._figures.update("  ".join(figures))
        # With a zero the bars stand on it, and not on the least of what was seen.
        tokens = self._history.tokens
        self._bars.data = [0.0, *tokens] if any(tokens) else []

    # ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _rows(self) -> Rows:
        return self._tables[self._tabs.active or "workers"]

    def action_table(self, name: str) -> None:
        """Show another table."""
        self._tabs.active = name
        self._tables[name].focus()
        self._say("")

    def action_sort(self) -> None:
        """Order by the next column."""
        self._rows.order.next_column(self._rows.table)
        self._rows.reorder()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self._rows.order.descending = not self._rows.order.descending
        self._rows.reorder()

    def action_filter(self) -> None:
        """Ask for a text that rows must have."""
        self._field.add_class("open")
        self._field.focus()

    def action_pause(self) -> None:
        """Keep what is shown, or go on."""
        self._paused = not self._paused
        self._say("paused: p goes on" if self._paused else "")

    def action_drain(self) -> None:
        """Ask whether the chosen worker is to finish and leave."""
        row = self._chosen("workers", "a worker to drain")
        if row is None:
            return
        name = row.name

        async def drain() -> str:
            await self._client.drain_worker(name, stay=True, timeout=TOP_TIMEOUT_S)
            return f"{name} drains: u takes that back"

        self._ask(f"drain {name}? It finishes its {row.in_flight} requests and takes no new ones", drain)

    async def action_undrain(self) -> None:
        """Have the chosen worker take requests again."""
        row = self._chosen("workers", "a worker to undrain")
        if row is not None:
            name = row.name

            async def undrain() -> str:
                await self._client.undrain_worker(name, timeout=TOP_TIMEOUT_S)
                return f"{name} takes requests again"

            await self._do(undrain)

    def action_cancel(self) -> None:
        """Ask whether the chosen request is to end."""
        row = self._chosen("requests", "a request to cancel")
        if row is None:
            return
        name, client = row.request, str(row.client_number or "")

        async def cancel() -> str:
            stopped = await self._client.cancel_request(name, client=client, timeout=TOP_TIMEOUT_S)
            return f"{name} of {stopped.client} is cancelled"

        self._ask(f"cancel {name} of {row.client}? Its client gets an error", cancel)

    async def action_confirm(self) -> None:
        """Do what was asked about."""
        asked, self._asked = self._asked, None
        if asked is not None:
            await self._do(asked)

    async def _do(self, action: Callable[[], Awaitable[str]]) -> None:
        try:
            self._say(await action())
        except FabricError as error:
            self._say(f"error {error.code}: {error.message}")

    def action_dismiss(self) -> None:
        """Do not do what was asked about; clear the filter."""
        self._asked = None
        self._say("")
        self._close_filter("")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter in the filter's field."""
        self._close_filter(event.value)

    def on_input_changed(self, event: Input.Changed) -> None:
        """The filter holds while it is typed."""
        self._rows.order.wanted = event.value.lower()
        self._rows.reorder()

    def _close_filter(self, wanted: str) -> None:
        self._field.value = wanted
        self._field.remove_class("open")
        self._rows.order.wanted = wanted.lower()
        self._rows.reorder()
        self._rows.focus()

    def _chosen(self, table: str, wanted: str) -> Any | None:
        """The row of a table that is shown; else say what to choose."""
        rows = self._tables[table]
        if rows is self._rows and rows.chosen is not None:
            return rows.chosen
        self._say(f"choose {wanted}: {list(self._tables).index(table) + 1}, then the arrows")
        return None

    def _ask(self, question: str, action: Callable[[], Awaitable[str]]) -> None:
        self._asked = action
        self._say(f"{question}. y/n")

    def on_rows_chosen(self) -> None:
        """Say why the chosen request is where it is."""
        if self._asked is None:
            self._say("")

    def _say(self, text: str) -> None:
        self._notice = text
        self._tell()

    def _tell(self) -> None:
        """Say what matters most: trouble, what came of a key, or why the chosen row is as it is."""
        row = self._rows.chosen
        told = self._trouble or self._notice or str(getattr(row, "why", ""))
        self._said.update(told)

    def on_tabbed_content_tab_activated(self, event: Any) -> None:
        """A table that is chosen with the mouse takes the keys."""
        self._rows.focus()
