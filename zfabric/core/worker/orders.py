"""What a worker's session and its driver say to each other of requests, and how requests are called between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zfabric.errors import FabricError
from zfabric.wire.payloads import AnyRequest
from zfabric.wire.traces import TraceContext


class Begin(NamedTuple):
    """Start this request, below this span of its trace if it has one."""

    request_id: str
    operation: str
    request: AnyRequest
    trace: TraceContext | None = None


class Stop(NamedTuple):
    """Stop this request; nothing more is wanted of it. Say `stopped` when its engine has."""

    request_id: str


class Spoiled(NamedTuple):
    """What the backend made of a request cannot be sent, so it ends with this error. The operator wants to know."""

    request_id: str
    error: FabricError


StreamOrder = Begin | Stop | Spoiled


class Columns(NamedTuple):
    """What most of an engine's step is: one token of the first choice for each of these requests, and its text."""

    request_ids: Sequence[str]
    token_ids: Sequence[int]
    texts: Sequence[str]


def name_of(instance: int, request: int, attempt: int) -> str:
    """How one attempt is called at its worker, in its logs, and by its backend."""
    return f"{instance:x}-{request:x}-{attempt}"


def client_name_of(request_id: str) -> str:
    """How the client of a request calls it (`stream.request_id`), from its name at the worker: what stands in logs."""
    return request_id.split("-")[1] if request_id.count("-") == 2 else request_id
