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
        Binding("r", "reverse", "Reverse"),
        Binding("slash", "filter", "Filter"),
        Binding("d", "drain", "Drain"),
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
        self._tables = {"workers": Rows(WORKERS), "models": Rows(MODELS), "requests": Rows(REQUESTS)}
        self._paused = False
        #: What the operator is asked to confirm.
        self._asked: Callable[[], Awaitable[str]] | None = None

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(id="head", markup=False)
            yield Static(id="figures", markup=False)
            yield Sparkline(id="tokens", summary_function=max)
            with TabbedContent(id="tabs"):
                for key, (name, rows) in enumerate(self._tables.items(), 1):
                    with TabPane(f"{key} {rows.table.title}", id=name):
                        yield rows
            yield Static(id="said", markup=False)
            yield Input(id="filter", placeholder="only rows with this text; Enter keeps it, Esc clears it")
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
            self._say(f"error {error.code}: {error.message}; what is shown is older")
            return
        self._history.add(status, workers)
        self._tables["workers"].show(workers)
        self._tables["models"].show(models)
        self._tables["requests"].show(requests.rows)
        if self._asked is None:
            self._explain()
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
        self.query_one("#head", Static).update("  ".join(head))
        rates = self._history.rates
        figures = [
            f"{status.in_flight:,} running",
            f"{status.queued:,} queued",
            f"{rates.requests:,.0f} requests/s",
            f"{rates.tokens:,.0f} tokens/s",
            f"{rates.failures:,.0f} failures/s",
        ]
        self.query_one("#figures", Static).update("  ".join(figures))
        # With a zero the bars stand on it, and not on the least of what was seen.
        tokens = self._history.tokens
        self.query_one(Sparkline).data = [0.0, *tokens] if any(tokens) else []

    # ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _rows(self) -> Rows:
        return self._tables[self.query_one(TabbedContent).active or "workers"]

    def action_table(self, name: str) -> None:
        """Show another table."""
        self.query_one(TabbedContent).active = name
        self._tables[name].focus()

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
        field = self.query_one("#filter", Input)
        field.add_class("open")
        field.focus()

    def action_pause(self) -> None:
        """Keep what is shown, or go on."""
        self._paused = not self._paused
        self._say("paused: p goes on" if self._paused else "")

    def action_drain(self) -> None:
        """Ask whether the chosen worker is to finish and leave."""
        row = self._tables["workers"].chosen
        if self.query_one(TabbedContent).active != "workers" or row is None:
            self._say("choose a worker to drain: 1, then the arrows")
            return
        name = row.name

        async def drain() -> str:
            await self._client.drain_worker(name, timeout=TOP_TIMEOUT_S)
            return f"{name} drains"

        self._ask(f"drain {name}? It finishes its {row.in_flight} requests and leaves", drain)

    async def action_confirm(self) -> None:
        """Do what was asked about."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        try:
            self._say(await asked())
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
        field = self.query_one("#filter", Input)
        field.value = wanted
        field.remove_class("open")
        self._rows.order.wanted = wanted.lower()
        self._rows.reorder()
        self._rows.focus()

    def _ask(self, question: str, action: Callable[[], Awaitable[str]]) -> None:
        self._asked = action
        self._say(f"{question}. y/n")

    def _say(self, text: str) -> None:
        self.query_one("#said", Static).update(text)

    def on_rows_chosen(self) -> None:
        """Say why the chosen request is where it is."""
        if self._asked is None:
            self._explain()

    def _explain(self) -> None:
        row = self._rows.chosen
        self._say(str(getattr(row, "why", "")))

    def on_tabbed_content_tab_activated(self, event: Any) -> None:
        """A table that is chosen with the mouse takes the keys."""
        self._rows.focus()
