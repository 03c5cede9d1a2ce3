"""`zfabric explain`: why a request went where it went, or why it still waits."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from zfabric.cli.look import Limit
from zfabric.cli.options import Config, Endpoint, Json, Timeout, Transport
from zfabric.cli.tables import Column, print_json, show
from zfabric.client.sync import Client
from zfabric.wire.explanations import Choice, Explanation, HostStatus


def _remarks(row: HostStatus) -> str:
    return ", ".join(["has it"] * row.serves_it + ["had its affinity"] * row.held)


_HOST_COLUMNS: Sequence[Column] = (
    ("worker", lambda row: row.worker),
    ("state", lambda row: row.state),
    ("load", lambda row: row.load),
    ("speed", lambda row: row.speed),
    ("mean s", lambda row: row.latency_s),
    ("cached blocks", lambda row: row.cached),
    ("cost", lambda row: row.cost),
    ("remarks", _remarks),
)


def explain(
    request: str,
    *,
    limit: Limit = 100,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Explain where a request went and why, or why it waits: what its policy knew at each dispatch, and how its hosts stand now.

    REQUEST is its name, as `zfabric requests`, logs and traces show it.

    **Examples**

    `zfabric explain 5f2c9d0e1b7a4c33` · `zfabric explain 5f2c9d0e1b7a4c33 --json`
    """
    with Client(endpoint, transport=transport) as client:
        found = client.explain(request, limit=limit, timeout=timeout)
    if as_json:
        print_json(found)
        return
    console = Console()
    for line in sentences(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if found.hosts:
        console.print(f"\nIts hosts now, by policy {found.policy}:", highlight=False)
        show(found.hosts, _HOST_COLUMNS, as_json=False, empty="")
        if found.left_out:
            console.print(f"… and {found.left_out:,} more: --limit", highlight=False)


def sentences(found: Explanation) -> list[str]:
    """What was found, as sentences: what the request does now, and each dispatch, the last one first."""
    told = []
    if (row := found.request) is None:
        told.append("The request has ended.")
    else:
        where = f" at {row.worker}" if row.worker else ""
        told.append(f"Attempt {row.attempt} of {row.operation} for {row.model or 'a worker'} is {row.state}{where}.")
        if row.why:
            told.append(f"Why: {row.why}.")
    return told + [_sentence(choice) for choice in found.choices]


def _sentence(choice: Choice) -> str:
    told = f"{choice.ago_s:.1f} s ago attempt {choice.attempt} went to {choice.worker}: {_HOW[choice.decision]}"
    if choice.candidates:
        told += f" {choice.policy} chose among {choice.candidates}"
        shown = ", ".join(f"{name} {load}" for name, load in sorted(choice.loads.items(), key=lambda item: item[1]))
        told += f", with requests {shown}" if len(choice.loads) == choice.candidates else f"; least loaded: {shown}"
    if choice.held:
        told += f"; its affinity was held by {choice.held}"
    if choice.blocks:
        told += f"; {choice.cached} of {choice.blocks} blocks were cached there"
        if choice.cached_most > choice.cached:
            told += f", and {choice.cached_most} at {choice.cached_most_at}"
    return f"{told}."


_HOW = {
    "chosen": "policy",
    "moved": "after it was moved from another model's queue, policy",
    "queued": "it waited, and this was the first worker with a free slot",
    "asked": "its client named the worker",
}
