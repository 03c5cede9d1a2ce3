"""zfabric replay: what a recording tells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts
from rich.console import Console

from zfabric.cli.options import Config
from zfabric.cli.tables import print_json
from zfabric.recording.reader import Event, read_recordings
from zfabric.recording.timeline import Filter, as_row, details_of
from zfabric.transport.clock import local_time


def replay(
    file: Annotated[list[Path], cyclopts.Parameter(help="Recordings, as of a controller and of its workers.")],
    /,
    *,
    request: Annotated[
        str, cyclopts.Parameter(help="Only this request: its name at its client, or how that begins.")
    ] = "",
    model: Annotated[str, cyclopts.Parameter(help="Only what is about this model.")] = "",
    worker: Annotated[str, cyclopts.Parameter(help="Only what is about this worker.")] = "",
    event: Annotated[str, cyclopts.Parameter(help="Only events of this name.")] = "",
    as_json: Annotated[
        bool, cyclopts.Parameter(name="--json", negative=(), help="Print JSON instead of lines.")
    ] = False,
    config: Config = None,
) -> None:
    """Print what happened, from recordings that `--record` of a controller or worker has made.

    **Examples**

    `zfabric replay controller.rec worker-7.rec` · `zfabric replay controller.rec --worker worker-7`

    `zfabric replay controller.rec --event worker_lost --json`
    """
    del config
    recording = read_recordings(file)
    wanted = Filter(request=request, model=model, worker=worker, name=event)
    begin_ns = recording.events[0].unix_ns if recording.events else 0
    found = list(wanted.of(recording.events))
    if as_json:
        print_json([as_row(one, begin_ns) for one in found])
    else:
        console = Console(highlight=False, soft_wrap=True)
        for one in found:
            console.print(_line(one, begin_ns), markup=False)
    for part in recording.broken:
        Console(stderr=True, highlight=False, style="dim", soft_wrap=True).print(
            f"{part} broke off; it was read so far"
        )


def _line(event: Event, begin_ns: int) -> str:
    """The time of the day, seconds since the begin, what, of which request and worker, and the rest."""
    request = f"{event.request}-{event.attempt}" if event.request else ""
    after_s = (event.unix_ns - begin_ns) / 1e9
    worker = event.fields.get("worker", "")
    time = local_time(event.unix_ns)
    return f"{time} {after_s:+12.6f}  {event.name:<17} {request:<18} {worker:<12} {details_of(event)}".rstrip()
