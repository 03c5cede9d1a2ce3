"""Commands that change what a fabric does: drain, undrain, pause, resume, cancel, kick, config, operate."""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Sequence
from typing import Annotated, Any, Final

import cyclopts
import msgspec
from rich.console import Console

from zfabric.cli.options import Config, Endpoint, Json, Timeout, Transport
from zfabric.cli.tables import Column, print_json, show
from zfabric.client.sync import Client
from zfabric.errors import ConfigurationError, RequestError
from zfabric.limits import KICK_MS, NAME_LENGTH_MAX, UNTAKEN_MS

#: Arguments of `Client.operate` itself.
_OWN_ARGUMENTS: Final = frozenset({"worker", "call", "model", "timeout"})
_SETTING_COLUMNS: Sequence[Column] = (
    ("name", lambda row: row.name),
    ("value", lambda row: str(row.value)),
    ("default", lambda row: str(row.default)),
    ("changeable", lambda row: "yes" if row.changeable else "no"),
    ("changed by", lambda row: row.changed_by),
    ("", lambda row: row.why),
)


def drain(
    worker: str,
    *,
    limit_ms: int = 0,
    stay: Annotated[
        bool, cyclopts.Parameter(negative=(), help="Take nothing new, but do not leave; undrain takes it back.")
    ] = False,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Have a worker take nothing new, finish what it has and leave. --limit-ms 0 is the worker's own limit.

    **Examples**

    `zfabric drain gpu-1 --limit-ms 60000` · `zfabric drain gpu-1 --stay`
    """
    with _operator(endpoint, transport) as client:
        name = client.drain_worker(worker, limit_ms, stay=stay, timeout=timeout)
    _tell({"draining": name}, f"{name} drains", as_json=as_json)


def undrain(
    worker: str,
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Have a worker take requests again that was drained from here and has not left.

    **Examples**

    `zfabric undrain gpu-1`
    """
    with _operator(endpoint, transport) as client:
        name = client.undrain_worker(worker, timeout=timeout)
    _tell({"undrained": name}, f"{name} takes requests again", as_json=as_json)


def pause(
    model: str,
    *,
    wait_ms: Annotated[
        int, cyclopts.Parameter(help="So long requests wait; then they are refused. 0 refuses at once.")
    ] = UNTAKEN_MS,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Have a model's requests wait. What runs runs on, and deadlines hold.

    **Examples**

    `zfabric pause smollm2` · `zfabric pause smollm2 --wait-ms 600000`
    """
    with _operator(endpoint, transport) as client:
        name = client.pause_model(model, wait_ms=wait_ms, timeout=timeout)
    _tell({"paused": name}, f"{name} is paused", as_json=as_json)


def resume(
    model: str,
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Have a paused model's requests dispatched again.

    **Examples**

    `zfabric resume smollm2`
    """
    with _operator(endpoint, transport) as client:
        name = client.resume_model(model, timeout=timeout)
    _tell({"resumed": name}, f"{name} is dispatched again", as_json=as_json)


def cancel(
    request: str,
    *,
    client: Annotated[str, cyclopts.Parameter(help="Its client's label or number, where the name is not enough.")] = "",
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """End anybody's request; its client is told who did.

    **Examples**

    `zfabric cancel 2f1c66ab01d4e3f0`, a name as `zfabric requests` lists it
    """
    with _operator(endpoint, transport) as connected:
        stopped = connected.cancel_request(request, client=client, timeout=timeout)
    _tell(stopped, f"request {request} of client {stopped.client} is cancelled", as_json=as_json)


def kick(
    client: str,
    *,
    refuse_ms: Annotated[int, cyclopts.Parameter(help="So long it gets no session; 0 lets it come back.")] = KICK_MS,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """End a client's requests and its session, and let it have none for some time.

    **Examples**

    `zfabric kick backend-1` · `zfabric kick 1804289383 --refuse-ms 0`
    """
    with _operator(endpoint, transport) as connected:
        stopped = connected.kick_client(client, refuse_ms=refuse_ms, timeout=timeout)
    _tell(stopped, f"client {stopped.client} is gone, with {len(stopped.requests)} requests", as_json=as_json)


def config_get(
    name: Annotated[str, cyclopts.Parameter(help="One setting; all by default.")] = "",
    /,
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """List the controller's settings, which of them can be changed while it runs, and why others cannot.

    **Examples**

    `zfabric config get` · `zfabric config get policy --json`
    """
    with _operator(endpoint, transport) as client:
        rows = [row for row in client.settings(timeout=timeout) if name in ("", row.name)]
    if not rows:
        raise ConfigurationError(f"there is no setting {name!r}", setting=name)
    show(rows, _SETTING_COLUMNS, as_json=as_json, empty="")


def config_set(
    name: str,
    value: Annotated[
        str, cyclopts.Parameter(allow_leading_hyphen=True, help="The new one; default is that of the start.")
    ],
    /,
    *,
    timeout: Timeout = None,
    endpoint: Endpoint = None,
    transport: Transport = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Change a setting of the running controller. The next start has its file's value again.

    **Examples**

    `zfabric config set policy power_of_two` · `zfabric config set speed.gpu-1 2` · `zfabric config set stall_ms default`
    """
    wanted: Any = value
    if value == "default":
        wanted = None
    else:
        with contextlib.suppress(msgspec.DecodeError):
            wanted = msgspec.json.decode(value)
    with _operator(endpoint, transport) as client:
        row = client.change_setting(name, wanted, timeout=timeout)
    _tell(row, f"{row.name} is {row.value}: {row.why}", as_json=as_json)


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
    """Call an operation of a worker's backend, such as loading an adapter.

    **Examples**

    `zfabric operate gpu-1 load_lora name=poet path=/adapters/poet`
    """
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


def _operator(endpoint: str | None, transport: str | None) -> Client:
    """A client whose label says in the controller's log who operates, where no key does."""
    user = "somebody"
    with contextlib.suppress(Exception):  # a process may run as a user without a name
        user = getpass.getuser()
    return Client(endpoint, transport=transport, label=f"{user}@{socket.gethostname()}"[:NAME_LENGTH_MAX])


def _tell(value: object, sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        Console().print(sentence, highlight=False, markup=False, soft_wrap=True)
