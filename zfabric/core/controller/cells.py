"""Workers that are cells: controllers that serve the sum of their models. See `zfabric.core.cell` for the cell's own side."""

from __future__ import annotations

from zfabric.core.controller.peers import Request, WorkerPeer
from zfabric.core.controller.registry import Registry
from zfabric.errors import CellLoopError
from zfabric.limits import CELL_DEPTH_MAX, CELLS_MAX
from zfabric.wire.messages import Dispatch, WorkerHello


def below(registry: Registry) -> list[int]:
    """The controllers of all cells that are registered here, each once."""
    return sorted({epoch for worker in registry.workers.values() for epoch in worker.cells})


def depth_of(registry: Registry) -> int:
    """How many controllers a request may pass below this one."""
    return max((worker.depth for worker in registry.workers.values()), default=0)


def loop_of(hello: WorkerHello, epoch: int) -> CellLoopError | None:
    """Why a cell cannot be one of the controller of this number; None where it can, and for any other worker."""
    if not hello.cells and not hello.depth:
        return None
    if epoch in hello.cells:
        own = "it is this controller itself" if hello.cells == [epoch] else "this controller is one of its own cells"
        return CellLoopError(f"cell {hello.name!r} would serve itself: {own}", worker=hello.name)
    if hello.depth > CELL_DEPTH_MAX:
        return CellLoopError(
            f"cell {hello.name!r} is {hello.depth} controllers deep, limit is {CELL_DEPTH_MAX}",
            worker=hello.name,
            depth=hello.depth,
        )
    if len(hello.cells) >= CELLS_MAX:
        return CellLoopError(f"cell {hello.name!r} has {len(hello.cells)} cells, limit is {CELLS_MAX - 1}")
    return None


def find_worker(registry: Registry, name: str) -> WorkerPeer | None:
    """The worker of a name, or the cell whose name stands before a slash in it."""
    found = registry.workers.get(name)
    at = name.find("/")
    while found is None and at > 0:
        cell = registry.workers.get(name[:at])
        found = cell if cell is not None and cell.cells else None
        at = name.find("/", at + 1)
    return found


def dispatch_of(request: Request, worker: WorkerPeer, now_ns: int) -> Dispatch:
    """What a worker is told of a request. A cell is told what its own dispatch may go by, too."""
    client = request.client
    assert client is not None
    span, left_ms = request.span, None
    if request.deadline_ns is not None:
        left_ms = max(0, (request.deadline_ns - now_ns) // 1_000_000)
    envelope = Dispatch(
        client=client.number,
        instance=request.instance,
        request=request.request,
        attempt=request.attempt,
        operation=request.operation,
        model=request.model.name if request.model is not None else "",
        priority=request.priority,
        deadline_ms=left_ms,
        window=request.window,
        resume_from=request.resume_from,
        lock=request.lock,
        traceparent=request.traceparent if span is None else span.context.traceparent,
        tracestate=request.tracestate,
    )
    if worker.cells:
        envelope.affinity = request.affinity
        envelope.prefix, envelope.prefix_block = request.prefix, request.prefix_block
        envelope.worker = request.wanted.removeprefix(worker.name).removeprefix("/")
    return envelope
