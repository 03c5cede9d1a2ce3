"""A run as one file to look at: tables and plots, the plots drawn into the page, nothing to load from elsewhere."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.record import Plot, Report, Table

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8885; --good: #1a7f37; --bad: #b35900; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 66rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem; }
.met { color: var(--good); font-weight: 600; } .missed { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0; background: #fff; border-radius: .5rem; } svg { max-width: 100%; height: auto; }
.notes { color: #777; }
"""
#: The one that the page is about stands out.
_OWN: Final = "#0b62d6"


def page(environment: dict[str, Any], reports: Sequence[Report]) -> str:
    """The whole page."""
    facts = (
        f"{environment['cores']} cores of {environment['cpu']} · Python {environment['python']} · libzmq "
        f"{environment['libzmq']} · {environment['profile']} run of {environment['started']} · commit "
        f"{environment['commit']} · load before {environment['load_before'][0]}"
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>zfabric benchmarks</title><style>{_STYLE}</style><h1>zfabric benchmarks</h1>",
        f"<p>{html.escape(facts)}</p><h2>Goals</h2>",
        _goals(reports),
    ]
    for report in reports:
        parts.append(f"<h2 id='{report.name}'>{html.escape(report.title)}</h2>")
        parts += [_table(table) for table in report.tables]
        parts += [f"<figure>{_svg(plot)}</figure>" for plot in report.plots if plot.lines]
        notes = [f"Not equal: {text}" for text in report.unequal] + [f"Left out: {text}" for text in report.skipped]
        if notes:
            parts.append("<ul class=notes>" + "".join(f"<li>{html.escape(note)}" for note in notes) + "</ul>")
    return "\n".join(parts) + "</html>\n"


def _goals(reports: Sequence[Report]) -> str:
    lines = []
    for metric in (metric for report in reports for metric in report.metrics if metric.goal is not None):
        sign = "≥" if metric.better == "higher" else "≤"
        word = "met" if metric.met else "missed"
        low, high = min(metric.rounds), max(metric.rounds)
        cells = (
            metric.name,
            f"{metric.value:,.4g} {metric.unit}",
            f"{low:,.4g} – {high:,.4g}",
            f"{sign} {metric.goal:g}",
        )
        row = "".join(f"<td>{html.escape(cell)}" for cell in cells)
        lines.append(f"<tr>{row}<td>{html.escape(metric.reference)}<td class={word}>{word}")
    head = "".join(f"<th>{title}" for title in ("metric", "median", "rounds", "goal", "against", ""))
    return f"<table><tr>{head}{''.join(lines)}</table>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in table.rows)
    return f"<table><caption>{html.escape(table.title)}</caption><tr>{head}{rows}</table>"


def _svg(plot: Plot) -> str:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, line in plot.lines.items():
        own = name.startswith(("zfabric", "controller"))
        xs, ys = [x for x, _ in line], [y for _, y in line]
        if plot.kind == "distribution":
            # Nines of the percentile: 90, 99, 99.9 lie at equal distances.
            xs = [1 / (1 - min(x, 99.99) / 100) for x in xs]
        style = "-" if own else "--"
        colour = _OWN if name in ("zfabric", "controller") else None
        axes.plot(
            xs,
            ys,
            style,
            label=name,
            linewidth=2.2 if own else 1.2,
            color=colour,
            marker="o" if plot.kind == "lines" else "",
        )
    axes.set(title=plot.title, ylabel=plot.y_label, xscale="log", yscale="log", xlabel=plot.x_label)
    if plot.kind == "distribution":
        axes.set_xticks([1, 2, 10, 100, 1_000], ["0", "50", "90", "99", "99.9"])
        axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="best", fontsize="small", ncols=2)
    text = io.StringIO()
    # The same figures give the same file, so that a repeated run shows only what changed.
    with mpl.rc_context({"svg.hashsalt": plot.title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
