"""zfabric ping: whether a controller answers, and serves; for probes."""

from __future__ import annotations

import time
from typing import Annotated, Any

import cyclopts
from rich.console import Console

from zfabric.cli.app import report
from zfabric.cli.options import Config, Endpoint, Json, Transport
from zfabric.cli.tables import print_json
from zfabric.client.sync import Client
from zfabric.errors import FabricError, NoWorkerError
from zfabric.limits import PING_TIMEOUT_S


def ping(
    *,
    worker: Annotated[str, cyclopts.Parameter(help="Also whether this worker is registered and takes requests.")] = "",
    model: Annotated[
        str, cyclopts.Parameter(help="Also whether somebody serves this model and takes requests for it.")
    ] = "",
    timeout: Annotated[float, cyclopts.Parameter(help="Seconds for all of it.")] = PING_TIMEOUT_S,
    quiet: Annotated[bool, cyclopts.Parameter(negative=(), help="Print nothing; the exit code tells.")] = False,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> int:
    """Ask whether a controller answers within a time. The exit code is 0 if so, and 1 if not.

    **Examples**

    `zfabric ping --quiet --timeout 1` · `zfabric ping --worker gpu-1` · `zfabric ping --model smollm2 --json`
    """
    try:
        answer = _ask(endpoint, transport, timeout, worker, model)
    except FabricError as error:
        if not quiet:
            report(error, Console(stderr=True, highlight=False, soft_wrap=True))
        return 1
    if as_json and not quiet:
        print_json(answer)
    elif not quiet:
        sentence = "{endpoint} answers in {milliseconds} ms: version {version}, {workers} workers, {models} models"
        Console().print(sentence.format(**answer), highlight=False, markup=False, soft_wrap=True)
    return 0


def _ask(endpoint: str | None, transport: str | None, timeout: float, worker: str, model: str) -> dict[str, Any]:
    """Raises: FabricError, why it is not as it should be."""
    until = time.monotonic() + timeout

    def left() -> float:
        return max(0.001, until - time.monotonic())

    with Client(endpoint, transport=transport, connect_timeout_ms=max(1, int(timeout * 1_000))) as client:
        # The first answer needs a connection, which is no part of how fast the controller is.
        client.status(timeout=left())
        began = time.perf_counter()
        status = client.status(timeout=left())
        took_ms = (time.perf_counter() - began) * 1_000
        if worker:
            rows = {row.name: row for row in client.workers(timeout=left())}
            if worker not in rows:
                raise NoWorkerError(f"no worker is named {worker!r}", worker=worker)
            if rows[worker].state != "ready":
                raise NoWorkerError(f"worker {worker!r} is {rows[worker].state}", worker=worker)
        if model:
            details = client.model_details(model, timeout=left())
            if details.paused_by:
                raise NoWorkerError(f"model {model!r} is paused by operator {details.paused_by!r}", model=model)
            ready = {row.name for row in client.workers(timeout=left()) if row.state == "ready" and row.slots}
            if not ready & set(details.workers):
                raise NoWorkerError(f"no worker of {model!r} takes requests", model=model)
        return {
            "endpoint": client.endpoint,
            "milliseconds": round(took_ms, 3),
            "version": status.version,
            "workers": status.workers,
            "models": status.models,
        }
