"""Commands that only look: models, workers, status, requests, clients, queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import cyclopts
import msgspec
from rich.console import Console

from zfabric.cli.options import Config, Endpoint, Json, Timeout, Transport, Watch
from zfabric.cli.tables import Column, again_and_again, print_json, show
from zfabric.client.sync import Client

#: Workers that are asked how they are have answered within this time, which is some round trips.
_TOLD_S: Final = 0.05
Limit = Annotated[int, cyclopts.Parameter(help="Rows at most, up to 1000.")]
Offset = Annotated[int, cyclopts.Parameter(help="Rows to leave out at the beginning.")]
OfModel = Annotated[str, cyclopts.Parameter(help="Of this model alone, by its name or an alias.")]
OfClient = Annotated[str, cyclopts.Parameter(help="Of this client alone, by its label or number.")]
#: What a model says of how it writes calls and reasoning.
_PARSERS: Final = (("tools", "tool_parser"), ("reasoning", "reasoning_parser"))
_MODEL_COLUMNS: Sequence[Column] = (
    ("name", lambda row: row.name),
    ("aliases", lambda row: row.aliases),
    ("workers", lambda row: len(row.workers)),
    ("slots", lambda row: row.slots),
    ("running", lambda row: row.in_flight),
    ("queued", lambda row: row.queued),
    ("context", lambda row: row.context_length),
    ("can", lambda row: row.capabilities),
    ("parsers", lambda row: [f"{name}={row.details[key]}" for name, key in _PARSERS if key in row.details]),
    ("paused by", lambda row: row.paused_by),
    ("defaults", lambda row: [f"{name}={value:g}" for name, value in row.defaults.items()]),
)
_WORKER_COLUMNS: Sequence[Column] = (
    ("name", lambda row: row.name),
    ("state", lambda row: f"{row.state} by {row.drained_by}" if row.drained_by else row.state),
    ("circuits", lambda row: ", ".join(f"{name} {state}" for name, state in row.circuits.items())),
    ("models", lambda row: row.models),
    ("slots", lambda row: row.slots),
    ("running", lambda row: row.in_flight),
    ("elsewhere", lambda row: row.elsewhere),
    ("tokens/s", lambda row: row.tokens_per_second),
    ("done", lambda row: row.finished),
    ("failed", lambda row: row.failed),
    ("silent ms", lambda row: row.silence_ms),
    ("unread bytes", lambda row: row.buffered_bytes),
    ("up s", lambda row: row.age_s),
    ("version", lambda row: row.build),
)
_SCALING_COLUMNS: Sequence[Column] = (
    ("model", lambda row: row.model),
    ("desired", lambda row: row.desired),
    ("ready", lambda row: row.ready),
    ("min", lambda row: row.min),
    ("max", lambda row: row.max),
    ("running", lambda row: row.running),
    ("waiting", lambda row: row.waiting),
    ("longest s", lambda row: row.longest_wait_s),
    ("slots", lambda row: row.slots),
    ("tokens/s", lambda row: row.tokens_per_second),
)
_REQUEST_COLUMNS: Sequence[Column] = (
    ("request", lambda row: row.request),
    ("client", lambda row: row.client),
    ("model", lambda row: row.model),
    ("state", lambda row: row.state),
    ("prio", lambda row: row.priority),
    ("place", lambda row: row.place),
    ("worker", lambda row: row.worker),
    ("waited s", lambda row: row.waited_s),
    ("ran s", lambda row: row.running_s),
    ("left s", lambda row: row.deadline_s),
    ("tokens", lambda row: row.units),
    ("why", lambda row: row.why),
)
_CLIENT_COLUMNS: Sequence[Column] = (
    ("client", lambda row: row.client),
    ("number", lambda row: str(row.number)),
    ("state", lambda row: row.state),
    ("key", lambda row: row.key),
    ("waiting", lambda row: row.waiting),
    ("running", lambda row: row.running),
    ("longest s", lambda row: row.longest_wait_s),
    ("silent s", lambda row: row.silence_s),
    ("unread bytes", lambda row: row.buffered_bytes),
    ("up s", lambda row: row.age_s),
    ("version", lambda row: row.build),
)
_QUEUE_COLUMNS: Sequence[Column] = (
    ("model", lambda row: row.model),
    ("asks", lambda row: f"{row.operation}, resumed" if row.resumes else row.operation),
    ("waiting", lambda row: row.waiting),
    ("clients", lambda row: row.clients),
    ("bytes", lambda row: row.size),
    ("longest s", lambda row: row.longest_wait_s),
    ("workers", lambda row: row.workers),
    ("taking", lambda row: row.taking),
    ("ends in s", lambda row: row.ends_s),
    ("why", lambda row: row.why),
)


def models(
    kind: str = "all",
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List models: all, language, multimodal or embedding.

    **Examples**

    `zfabric models` · `zfabric models embedding --json`
    """
    with Client(endpoint, transport=transport) as client:
        show(
            client.models(kind, timeout=timeout),
            _MODEL_COLUMNS,
            as_json=as_json,
            empty="no models: no worker is registered",
        )


def scaling(
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List how many workers models should have, and by what; of models that have a rule for that in the fleet's file.

    **Examples**

    `zfabric scaling` · `zfabric scaling --json`
    """
    with Client(endpoint, transport=transport) as client:
        show(
            client.scaling(timeout=timeout),
            _SCALING_COLUMNS,
            as_json=as_json,
            empty="no model has a rule for its workers",
        )


def workers(
    *,
    refresh: bool = False,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List workers. --refresh has them report their load first.

    **Examples**

    `zfabric workers` · `zfabric workers --refresh --json`
    """
    with Client(endpoint, transport=transport) as client:
        if refresh:
            client.refresh(timeout=timeout)
            # What they answer overtakes nothing, so a moment is enough.
            time.sleep(_TOLD_S)
        show(client.workers(timeout=timeout), _WORKER_COLUMNS, as_json=as_json, empty="no workers")


def status(
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """The controller in figures.

    **Examples**

    `zfabric status` · `zfabric status --json --timeout 2`
    """
    with Client(endpoint, transport=transport) as client:
        found = client.status(timeout=timeout)
    if as_json:
        print_json(found)
        return
    rows = [(name, value) for name, value in msgspec.to_builtins(found).items() if name != "transport"]
    rows += sorted(found.transport.items())
    show(rows, (("figure", lambda row: row[0]), ("value", lambda row: str(row[1]))), as_json=False, empty="")


def requests(
    *,
    model: OfModel = "",
    client: OfClient = "",
    worker: Annotated[str, cyclopts.Parameter(help="At this worker alone.")] = "",
    state: Annotated[str, cyclopts.Parameter(help="In this state alone, such as queued or running.")] = "",
    sort: Annotated[
        str,
        cyclopts.Parameter(
            help="age (the oldest first), place (in its queue), deadline, client, model, worker or units."
        ),
    ] = "age",
    limit: Limit = 100,
    offset: Offset = 0,
    watch: Watch = None,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List requests: who waits for what, at which place, on which worker, and why it is not dispatched.

    An operator sees all, anybody else the requests of the same connection, which a command has none of.

    **Examples**

    `zfabric requests --state queued --sort place --model smollm2` · `zfabric requests --worker gpu-1 --watch 1`
    """
    with Client(endpoint, transport=transport) as connected:

        def fetch() -> Any:
            return connected.requests(
                model=model,
                client=client,
                worker=worker,
                state=state,
                sort=sort,
                limit=limit,
                offset=offset,
                timeout=timeout,
            )

        if any(row.worker for row in fetch().rows):
            # To ask has the workers tell how far they are.
            time.sleep(_TOLD_S)
        _list(fetch, _REQUEST_COLUMNS, as_json=as_json, watch=watch, empty="no requests")


def clients(
    *,
    client: OfClient = "",
    state: Annotated[str, cyclopts.Parameter(help="connected or away alone.")] = "",
    sort: Annotated[
        str, cyclopts.Parameter(help="requests (the most first), age, silence, client or buffered.")
    ] = "requests",
    limit: Limit = 100,
    offset: Offset = 0,
    watch: Watch = None,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List clients: how many of their requests wait and run, and whether they read what is sent to them.

    **Examples**

    `zfabric clients --sort buffered` · `zfabric clients --state away --json`
    """
    with Client(endpoint, transport=transport) as connected:

        def fetch() -> Any:
            return connected.clients(client=client, state=state, sort=sort, limit=limit, offset=offset, timeout=timeout)

        _list(fetch, _CLIENT_COLUMNS, as_json=as_json, watch=watch, empty="no clients")


def queue(
    *,
    model: OfModel = "",
    sort: Annotated[str, cyclopts.Parameter(help="waiting (the most first), model or wait.")] = "waiting",
    limit: Limit = 100,
    offset: Offset = 0,
    watch: Watch = None,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List what waits, by model and by what it demands of a worker: how much, how long, and why.

    **Examples**

    `zfabric queue --watch 1` · `zfabric queue --model smollm2 --json`
    """
    with Client(endpoint, transport=transport) as connected:

        def fetch() -> Any:
            return connected.queue(model=model, sort=sort, limit=limit, offset=offset, timeout=timeout)

        _list(fetch, _QUEUE_COLUMNS, as_json=as_json, watch=watch, empty="nothing waits")


def _list(
    fetch: Callable[[], Any], columns: Sequence[Column], *, as_json: bool, watch: float | None, empty: str
) -> None:
    """Show a list, and how much of it is left out; again and again where somebody watches."""

    def once() -> None:
        found = fetch()
        if as_json:
            print_json(found)
            return
        show(found.rows, columns, as_json=False, empty=empty)
        if found.left_out:
            Console().print(f"… and {found.left_out:,} more of {found.total:,}: --limit, --offset", highlight=False)

    again_and_again(once, watch)
