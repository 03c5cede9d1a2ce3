"""`zfabric top` in a terminal without a screen, in front of a real fabric."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from textual.pilot import Pilot

from tests.endpoints import ipc, run_directory
from tests.fabric import Fabric, fabric
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import StoppedByOperatorError
from zfabric.top.app import Top

__all__ = ["ipc", "run_directory"]


@dataclass
class Shown:
    """A view and what it looks at."""

    top: Top
    pilot: Pilot[None]
    fabric: Fabric
    client: AsyncClient

    @property
    def lines(self) -> list[str]:
        """The screen as text."""
        screen = self.top.screen
        return ["".join(segment.text for segment in line) for line in screen._compositor.render_strips(screen.size)]

    async def press(self, *keys: str) -> str:
        """Press keys. Returns the screen after them."""
        await self.pilot.press(*keys)
        await self.pilot.pause()
        return "\n".join(self.lines)


@contextlib.asynccontextmanager
async def shown(ipc: str, *, workers: int = 2, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Shown]:
    async with fabric(ipc) as made, AsyncClient(ipc) as client:
        for number in range(workers):
            await made.add_worker(f"w{number}", EchoWorker(EchoOptions(model_names=(f"m{number}",))), slots=4 + number)
        top = Top(client, ipc)
        async with top.run_test(size=size) as pilot:
            yield Shown(top, pilot, made, client)


async def test_a_usual_terminal_shows_it_all(ipc: str) -> None:
    async with shown(ipc) as view:
        text = await view.press("1")
        assert len(view.lines) == 24
        assert all(len(line) == 80 for line in view.lines)
        for expected in ("zfabric 0.", "shortest_queue", "2 workers", "w0", "ready", "Drain", "Quit"):
            assert expected in text, expected
        await view.client.generate("m0", "a", max_new_tokens=3)
        await view.top.look()
        row = next(line for line in (await view.press("1")).splitlines() if line.startswith("w0"))
        assert row.split()[6] == "1", "requests that it has done"
        assert "m1" in await view.press("2")


async def test_rows_are_ordered_and_filtered_by_keys(ipc: str) -> None:
    async with shown(ipc, workers=3) as view:

        def names(text: str) -> list[str]:
            return [line.split()[0] for line in text.splitlines() if line.startswith("w") and "ready" in line]

        assert names(await view.press("1")) == ["w0", "w1", "w2"]
        assert names(await view.press("r")) == ["w2", "w1", "w0"]
        # The fourth column is the slots, of which the last has most.
        text = await view.press("s", "s", "s")
        assert "slots▼" in text
        assert names(text) == ["w2", "w1", "w0"]
        assert names(await view.press("slash", "w", "1", "enter")) == ["w1"]
        assert names(await view.press("escape")) == ["w2", "w1", "w0"]


async def test_a_worker_is_drained_when_that_is_confirmed_and_undrained(ipc: str) -> None:
    async with shown(ipc) as view:
        assert "drain w1? It finishes its 0 requests" in await view.press("1", "down", "d")
        await view.press("n")
        assert {worker.state for worker in await view.client.workers()} == {"ready"}
        assert "w1 drains" in await view.press("d", "y")
        assert {worker.name: worker.state for worker in await view.client.workers()} == {
            "w0": "ready",
            "w1": "draining",
        }
        await view.top.look()
        assert any(line.split()[:2] == ["w1", "draining"] for line in (await view.press("1")).splitlines())
        assert "w1 takes requests again" in await view.press("u")
        assert {worker.state for worker in await view.client.workers()} == {"ready"}


async def test_a_request_is_cancelled_when_that_is_confirmed(ipc: str) -> None:
    async with shown(ipc) as view:
        assert "choose a request to cancel: 3" in await view.press("1", "c")
        stream = view.client.stream("m0", "a", max_new_tokens=10_000_000)
        await anext(stream)
        await view.top.look()
        name = stream.request_id
        assert f"cancel {name}" in await view.press("3", "c")
        assert f"{name} of" in await view.press("y")
        with pytest.raises(StoppedByOperatorError):
            async for _ in stream:
                pass


async def test_requests_are_listed_and_the_chosen_one_is_explained(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(ipc, label="alice") as client, AsyncClient(ipc) as operator:
        await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=100)), slots=1)
        first, second = (client.stream("echo", "a b", max_new_tokens=100_000) for _ in range(2))
        await anext(first)
        top = Top(operator, ipc)
        async with top.run_test(size=(100, 24)) as pilot:
            view = Shown(top, pilot, made, operator)
            rows = [line.split() for line in (await view.press("3")).splitlines() if "alice" in line]
            assert [(row[1:4], row[4]) for row in rows] == [
                (["alice", "echo", "running"], "0"),
                (["alice", "echo", "queued"], "1"),
            ]
            assert "slot" in await view.press("end")
        await first.aclose()
        await second.aclose()


async def test_a_thousand_workers_cost_the_rows_in_sight(ipc: str) -> None:
    async with shown(ipc, workers=1) as view:
        [row] = await view.client.workers()
        rows = [
            type(row)(**{**{f: getattr(row, f) for f in row.__struct_fields__}, "name": f"n{at:04d}"})
            for at in range(1_000)
        ]
        await view.press("p")
        table = view.top._tables["workers"]
        drawn = 0
        line = table._line

        def counted(*arguments: object) -> object:
            nonlocal drawn
            drawn += 1
            return line(*arguments)  # type: ignore[arg-type]

        table._line = counted  # type: ignore[assignment, method-assign]
        table.show(rows)
        text = await view.press("end")
        assert "n0999" in text
        assert "n0001" not in text
        assert drawn <= 4 * 24
        assert "n0000" in await view.press("home")


async def test_a_controller_that_is_gone_is_told_and_what_was_seen_stays(ipc: str) -> None:
    async with shown(ipc) as view, AsyncClient(ipc.replace(".sock", ".none"), connect_timeout_ms=1) as lost:
        view.top._client = lost
        await view.top.look()
        text = await view.press("1")
        assert "no controller" in text
        assert "what is shown is older" in text
        assert "w0" in text


async def test_a_pause_keeps_what_is_shown(ipc: str) -> None:
    async with shown(ipc) as view:
        assert "paused" in await view.press("p")
        await view.fabric.add_worker("w9", EchoWorker())
        await view.top.look()
        assert "w9" not in await view.press("1")
        await view.press("p")
        await view.top.look()
        assert "w9" in await view.press("1")
