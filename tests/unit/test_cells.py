"""Cells at their edges: what is refused, what finds no room, and what is told when."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.levels import CELL, Levels
from tests.peers import FakeFabric, model
from zfabric.cli.controller import cell_of
from zfabric.core.controller.cells import find_worker, loop_of
from zfabric.core.worker.session import Refused
from zfabric.errors import CellLoopError, ConfigurationError, NameTakenError, VersionMismatchError, WorkerLostError
from zfabric.limits import CELL_AWAY_MS, CELL_DEPTH_MAX, CELLS_MAX, PREFIX_BLOCK_TOKENS, WORKER_MODELS_MAX
from zfabric.testing.checkers import check_rest
from zfabric.wire import codec, kinds
from zfabric.wire.flow import Grant
from zfabric.wire.load import CachedBlocks, Load
from zfabric.wire.messages import Claim, Claims, WorkerHello
from zfabric.wire.prefixes import token_hashes


def hello(cells: list[int], depth: int) -> WorkerHello:
    return WorkerHello(
        version=kinds.PROTOCOL_VERSION, build="", name="c", instance=1, models=[], load=Load(), cells=cells, depth=depth
    )


@pytest.mark.parametrize(
    ("cells", "depth", "why"),
    [
        ([5], 1, "this controller itself"),
        ([7, 5], 2, "one of its own cells"),
        ([7], CELL_DEPTH_MAX + 1, "controllers deep"),
        (list(range(10, 10 + CELLS_MAX)), 1, "cells, limit"),
        ([7], CELL_DEPTH_MAX, None),
        ([], 0, None),
    ],
)
def test_what_is_no_cell_of_a_controller(cells: list[int], depth: int, why: str | None) -> None:
    error = loop_of(hello(cells, depth), 5)
    assert (error is None) == (why is None)
    assert error is None or (isinstance(error, CellLoopError) and why is not None and why in error.message)


def test_a_cell_that_comes_to_stand_below_itself_loses_its_session() -> None:
    levels = Levels()
    assert levels.peer is not None
    levels.cell.worker("w0", model("m"))
    levels.cell.broker.registry.workers["w0"].cells = [levels.parent.broker.epoch]
    levels.cell.broker.registry.revision += 1
    levels.look()
    assert levels.peer is None
    told = [it.fields["code"] for it in levels.parent.broker.journal.take() if it.event == "peer_refused"]
    assert told == [CellLoopError.code]
    assert any(isinstance(it, Refused) and isinstance(it.error, CellLoopError) for it in levels.orders)


def test_a_parent_that_sees_no_circles_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.core.controller.peers.MINOR_VERSION", 3)
    levels = Levels()
    assert levels.peer is None
    assert any(isinstance(it, Refused) and isinstance(it.error, VersionMismatchError) for it in levels.orders)


def test_a_worker_is_found_by_the_longest_path_that_somebody_has() -> None:
    fabric = FakeFabric()
    for name in ("east", "odd/name", "plain"):
        fabric.worker(name, model())
    registry = fabric.broker.registry
    registry.workers["east"].cells = [9]
    found = {
        name: find_worker(registry, name) for name in ("east/w1", "east/a/b", "odd/name", "odd/other", "plain/w1", "x")
    }
    assert {name: worker.name for name, worker in found.items() if worker is not None} == {
        "east/w1": "east",
        "east/a/b": "east",
        "odd/name": "odd/name",
    }


def test_models_beyond_what_a_worker_may_have_are_named_and_adapters_go_first() -> None:
    levels = Levels()
    base = model("base")
    base.loadable = ["adapter"]
    levels.cell.worker("w0", base, *[model(f"m{number:04}") for number in range(WORKER_MODELS_MAX - 2)])
    levels.look()
    assert levels.peer is not None
    assert len(levels.peer.hosts) == WORKER_MODELS_MAX
    assert "adapter" in levels.peer.hosts
    levels.cell.worker("w1", model("n"))
    levels.look()
    assert levels.session.left_out == ["adapter"]
    assert "n" in levels.peer.hosts
    assert "adapter" not in levels.peer.hosts


def test_with_much_running_models_are_told_later_and_slots_at_once() -> None:
    levels = Levels()
    levels.parent.client("alice")
    levels.cell.worker("w0", model("m"), slots=20_000)
    levels.look()
    for number in range(1, 5_001):
        levels.parent.submit("alice", number)
    levels.settle()
    levels.cell.worker("w1", model("n"), slots=5)
    levels.look()
    peer = levels.peer
    assert peer is not None
    assert peer.load.slots == 20_005
    assert "n" not in peer.hosts
    levels.pass_ms(1_000)
    assert "n" in peer.hosts


def test_without_its_parent_a_cell_works_on_for_a_while_and_no_longer() -> None:
    levels = Levels()
    levels.parent.client("alice")
    levels.cell.worker("w0", model("m"))
    levels.look()
    levels.parent.submit("alice", 1)
    levels.settle()
    live = levels.cell.broker.registry.workers["w0"].live
    (request,) = live.values()
    levels.cut()
    levels.pass_ms(CELL_AWAY_MS - 1_000)
    assert request.client is not None
    assert "Abort" not in [type(it).__name__ for it in levels.cell.sent["w0"]]
    levels.pass_ms(2_000)
    assert request.client is None
    assert "Abort" in [type(it).__name__ for it in levels.cell.sent["w0"]]
    assert not levels.cell.broker.registry.clients


def test_a_client_of_the_cells_own_keeps_its_number() -> None:
    """A number is no secret, so the parent's client of the same one has to take another cell."""
    levels = Levels()
    levels.parent.client("alice")
    levels.cell.instances["alice"] = levels.parent.instances["alice"]
    levels.cell.client("alice")
    levels.cell.worker("w0", model("m"))
    levels.look()
    levels.parent.submit("alice", 1)
    levels.settle()
    assert [error for _, error in levels.parent.ended("alice")] == [NameTakenError]
    assert not levels.cell.dispatches["w0"]


def test_and_a_client_of_the_parents_keeps_its_own_too() -> None:
    levels = Levels()
    levels.parent.client("alice")
    levels.cell.worker("w0", model("m"))
    levels.look()
    levels.parent.submit("alice", 1)
    levels.settle()
    levels.cell.instances["alice"] = levels.parent.instances["alice"]
    levels.cell.client("alice")
    assert levels.cell.refusals == [NameTakenError]
    assert len(levels.cell.broker.registry.workers["w0"].live) == 1


@pytest.mark.parametrize("gone", [False, True])
def test_an_answer_that_ends_while_its_client_is_away_from_the_parent_is_asked_for_again(gone: bool) -> None:
    levels = Levels()
    levels.parent.client("alice")
    levels.cell.worker("w0", model("m"))
    levels.look()
    levels.parent.submit("alice", 1)
    levels.settle()
    levels.parent.lose("alice")
    levels.cell.instances["alice"] = levels.parent.instances["alice"]
    levels.cell.end("w0", "alice", 1)
    levels.settle()
    worker = levels.cell.broker.registry.workers["w0"]
    assert not worker.live
    if gone:
        levels.cell.lose("w0")
    levels.parent.client("alice")
    levels.parent._receive("alice", codec.pack(Claims([Claim(request=1, attempt=0, next=0, window=9)])))
    levels.settle()
    if gone:
        assert levels.parent.ended("alice") == [(1, WorkerLostError)]
    else:
        (grant,) = [it for it in levels.cell.sent["w0"] if isinstance(it, Grant)]
        assert [(line.request, line.next, line.window, line.again) for line in grant.lines] == [(1, 0, 9, True)]
        # Its worker has kept it, and says it again.
        levels.cell.end("w0", "alice", 1)
        levels.settle()
        assert levels.parent.ended("alice") == [(1, None)]
    check_rest(levels.parent.broker)
    check_rest(levels.cell.broker)
    assert not levels.session.requests.owed


def test_a_cleared_cache_is_told_as_what_nobody_else_has() -> None:
    levels = Levels()
    for worker in ("w0", "w1"):
        levels.cell.worker(worker, model("m"))
    levels.look()
    blocks = token_hashes(list(range(4 * PREFIX_BLOCK_TOKENS)))
    unit = PREFIX_BLOCK_TOKENS
    levels.cell.tell("w0", CachedBlocks(model="m", stored=blocks, unit=unit))
    levels.cell.tell("w1", CachedBlocks(model="m", stored=blocks[:16], unit=unit))
    levels.look()
    index = levels.parent.broker.registry.placement.index
    assert len(index) == 4
    levels.cell.tell("w0", CachedBlocks(model="m", whole=True, unit=unit))
    levels.look()
    assert len(index) == 2
    levels.cell.leave("w1")
    levels.look()
    assert not len(index)


def test_what_is_said_of_a_parent_that_is_not_named_is_refused(tmp_path: Path) -> None:
    assert cell_of(None, None, None, None) is None
    named = cell_of("tcp://127.0.0.1:9000", None, None, None)
    assert named is not None
    assert named.name
    for name, key in (("east", None), (None, tmp_path / "k")):
        with pytest.raises(ConfigurationError, match="there is no parent"):
            cell_of(None, name, key, None)
    with pytest.raises(ConfigurationError, match="go together"):
        cell_of("tcp://127.0.0.1:9000", CELL, tmp_path / "k", None)
    with pytest.raises(ConfigurationError, match="one parent"):
        cell_of("tcp://127.0.0.1:9000,tcp://127.0.0.2:9000", CELL, None, None)
    for wrong in ("", "a/b", "x" * 300):
        with pytest.raises(ConfigurationError, match="cell is"):
            cell_of("tcp://127.0.0.1:9000", wrong, None, None)
