"""Commands that change what a fabric does: drain, operate."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Final

import cyclopts
import msgspec
from rich.console import Console

from zfabric.cli.options import Config, Endpoint, Json, Transport
from zfabric.cli.tables import print_json
from zfabric.client.sync import Client
from zfabric.errors import RequestError

#: Arguments of `Client.operate` itself.
_OWN_ARGUMENTS: Final = frozenset({"worker", "call", "model", "timeout"})


def drain(
    worker: str,
    *,
    limit_ms: int = 0,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Have a worker finish what it has and leave. --limit-ms 0 is the worker's own limit."""
    with Client(endpoint, transport=transport) as client:
        name = client.drain_worker(worker, limit_ms)
    if as_json:
        print_json({"draining": name})
    else:
        Console().print(f"{name} drains", highlight=False)


def operate(
    worker: str,
    call: str,
    arguments: Annotated[list[str] | None, cyclopts.Parameter(help="name=value; a value may be JSON.")] = None,
    /,
    *,
    model: str = "",
    timeout: Annotated[float | None, cyclopts.Parameter(help="Seconds to wait; two minutes by default.")] = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    config: Config = None,
) -> None:
    """Call an operation of a worker's backend, such as loading an adapter."""
    given: dict[str, Any] = {}
    for argument in arguments or []:
        name, separator, value = argument.partition("=")
        if not separator:
            raise RequestError(f"argument {argument!r} is not of the form name=value")
        if name in _OWN_ARGUMENTS:
            raise RequestError(f"argument {name!r} is not the call's: see zfabric operate --help", parameter=name)
        given[name] = value
        with contextlib.suppress(msgspec.DecodeError):
            given[name] = msgspec.json.decode(value)
    with Client(endpoint, transport=transport) as client:
        print_json(client.operate(worker, call, model=model, timeout=timeout, **given))
