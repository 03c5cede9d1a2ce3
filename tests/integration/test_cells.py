"""Cells: a controller that is one worker of another. Real sockets, one loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.cells import TCP, cell_of, served, until
from tests.fabric import Fabric, fabric, words
from tests.faults.proxy import proxy
from tests.keys import credentials, make_keys
from zfabric import AsyncClient, BaseModelWorker, Delta, ModelInfo, errors
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.cell import CellLink
from zfabric.controller.config import CellConfig, ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.errors import CellLoopError, DeadlineExceededError, RequestError, UnsupportedOperationError
from zfabric.limits import PREFIX_BLOCK_TOKENS
from zfabric.wire.payloads import OperateRequest
from zfabric.wire.prefixes import token_hashes
from zfabric.wire.tasks import ClassifyRequest, ClassifyResult, ScoreRequest

PACED = EchoOptions(tokens_per_second=200)


class Judge(BaseModelWorker):
    """Scores, classifies and has a call: what echo has not."""

    async def load(self) -> ModelInfo:
        return ModelInfo(name="judge", aliases=["court"])

    async def score(self, request: ScoreRequest) -> list[float]:
        return [float(len(document)) for document in request.documents]

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        return ClassifyResult([[0.25, 0.75] for _ in request.inputs], ["no", "yes"])

    async def operate(self, request: OperateRequest) -> Any:
        return {"did": request.call, **request.arguments}


class Rich(BaseModelWorker):
    """Hands over everything that a delta can have."""

    async def load(self) -> ModelInfo:
        return ModelInfo(name="rich")

    async def generate(self, request: Any) -> AsyncIterator[Delta]:
        yield Delta(text="a", token_ids=[7], reasoning="hm", extra={"system_fingerprint": "f"})
        yield Delta(text="b", token_ids=[8, 9], finish_reason="stop", stop_reason=9)


async def test_a_cell_is_one_worker_that_serves_what_its_workers_serve() -> None:
    async with fabric(TCP) as top, cell_of(top.endpoint, "east") as east, AsyncClient(top.endpoint) as client:
        await east.add_worker("w0", EchoWorker(), slots=3)
        await east.add_worker("w1", EchoWorker(), Judge(), Rich(), slots=4)
        await served(top, "echo", "judge", "rich")
        answer = await client.generate("echo", "a b c", max_new_tokens=9)
        assert (answer.text, answer.usage.completion_tokens) == (words("a b c", 9), 9)
        assert answer.worker in ("w0", "w1")
        assert await client.count_tokens("echo", "a b c") == 3
        assert (await client.embed("echo", ["a", "b"])).shape == (2, 8)
        assert list(await client.score("court", "q", ["ab", "abc"])) == [2.0, 3.0]
        assert (await client.classify("judge", ["a"]))[0].label == "yes"
        rich = await client.generate("rich", "x")
        choice = rich.choices[0]
        assert (choice.text, choice.token_ids, choice.reasoning) == ("ab", [7, 8, 9], "hm")
        assert (choice.stop_reason, rich.extra) == (9, {"system_fingerprint": "f"})
        with pytest.raises(UnsupportedOperationError):
            await client.embed("judge", "a")
        (worker,) = await client.workers()
        assert (worker.name, worker.slots, worker.models) == ("east", 7, ["echo", "judge", "rich"])
        assert worker.gauges["cell_workers"] == 2
        models = {model.name: model for model in await client.models()}
        assert (models["judge"].aliases, models["echo"].slots) == (["court"], 7)


async def test_an_operator_calls_a_worker_of_a_cell_by_its_path_and_cancels_through_it() -> None:
    async with fabric(TCP) as top, cell_of(top.endpoint, "east") as east, AsyncClient(top.endpoint) as client:
        await east.add_worker("w0", Judge())
        await served(top, "judge")
        assert await client.operate("east/w0", "shut", now=True) == {"did": "shut", "now": True}
        # The only worker of a cell needs no name.
        assert await client.operate("east", "shut") == {"did": "shut"}
        await east.add_worker("w1", EchoWorker(PACED))
        await served(top, "echo")
        with pytest.raises(RequestError, match="east/WORKER"):
            await client.operate("east", "shut")
        with pytest.raises(errors.NoWorkerError, match="w9"):
            await client.operate("east/w9", "shut")
        stream = client.stream("echo", "a", max_new_tokens=100_000)
        await anext(stream)
        await client.cancel_request(stream.request_id)
        with pytest.raises(errors.StoppedByOperatorError):
            await stream
        async with AsyncClient(east.endpoint) as own:
            stream = client.stream("echo", "a", max_new_tokens=100_000)
            await anext(stream)
            (shown,) = [row for row in (await own.clients()).rows if row.client == "parent of east"]
            await own.kick_client(str(shown.number), refuse_ms=0)
            with pytest.raises(errors.StoppedByOperatorError):
                await stream
            # It is let in again at once.
            assert (await client.generate("echo", "a", max_new_tokens=3)).text == words("a", 3)
            await own.kick_client("parent of east", refuse_ms=60_000)
            with pytest.raises(errors.PermissionDeniedError):
                await client.generate("echo", "a", max_new_tokens=3)
            east.controller.broker.registry.directives.kicked.clear()
        await client.drain_worker("east")
        await until(lambda: not top.controller.broker.registry.workers["east"].taking)
        # Its own clients are served on.
        async with AsyncClient(east.endpoint) as own:
            assert (await own.generate("echo", "a", max_new_tokens=3)).text == words("a", 3)
        await client.undrain_worker("east")
        assert (await client.generate("echo", "a", max_new_tokens=3)).text == words("a", 3)


async def test_what_comes_and_goes_in_a_cell_is_announced_and_an_empty_cell_stays() -> None:
    async with fabric(TCP) as top, cell_of(top.endpoint, "east") as east:
        known = top.controller.broker.registry
        await until(lambda: "east" in known.workers)
        assert not known.workers["east"].hosts
        await east.add_worker("w0", EchoWorker(), slots=2)
        await served(top, "echo")
        await east.add_worker("w1", EchoWorker(), slots=3)
        await until(lambda: known.workers["east"].load.slots == 5)
        # What the cell's own clients use is not offered.
        async with AsyncClient(east.endpoint) as own:
            stream = own.stream("echo", "a", max_new_tokens=100_000)
            await anext(stream)
            await until(lambda: known.workers["east"].load.slots == 4)
            await stream.aclose()
        await until(lambda: known.workers["east"].load.slots == 5)
        await east.remove_worker("w0")
        await east.remove_worker("w1")
        await until(lambda: not known.workers["east"].hosts)
        assert known.workers["east"].load.slots == 0


async def test_through_three_controllers_text_cancels_credit_and_deadlines_arrive() -> None:
    async with (
        fabric(TCP) as top,
        cell_of(top.endpoint, "middle") as middle,
        cell_of(middle.endpoint, "bottom") as bottom,
        AsyncClient(top.endpoint) as client,
    ):
        service = await bottom.add_worker("w0", EchoWorker(), slots=8)
        await served(top, "echo")
        answers = await asyncio.gather(*[client.generate("echo", f"s{n} x", max_new_tokens=300) for n in range(6)])
        assert [answer.text for answer in answers] == [words(f"s{n} x", 300) for n in range(6)]
        # A reader who does not read holds the engine's tokens back at the worker, and nowhere between.
        stream = client.stream("echo", "a", max_new_tokens=100_000)
        await anext(stream)
        await until(lambda: any(one.held_units for one in service._sessions.streams.values()))
        (held,) = service._sessions.streams.values()
        assert held.next <= held.window < 100_000
        for level in (top, middle, bottom):
            assert level.controller._figures()["buffered_bytes"] == 0
        # Reading on brings credit all the way.
        taken = 1
        while taken < 5_000:
            taken += len((await anext(stream)).token_ids)
        assert held.next >= 5_000
        await stream.aclose()
        await until(lambda: not service._sessions.busy)
        with pytest.raises(DeadlineExceededError):
            await client.generate("echo", "a", max_new_tokens=10_000_000, timeout=0.1)
        await until(lambda: not service._sessions.busy)


async def test_a_cell_is_refused_at_itself_and_below_itself() -> None:
    told: list[tuple[str, str, Any]] = []

    def log(who: str) -> Any:
        return lambda event, **fields: told.append((who, event, fields.get("code")))

    async with fabric(TCP, log=log("top")) as top, cell_of(top.endpoint, "a", log=log("a")) as middle:
        await until(lambda: "a" in top.controller.broker.registry.workers)
        async with cell_of(middle.endpoint, "b", log=log("b")) as bottom:
            cells = top.controller.broker.registry.workers
            await until(lambda: len(cells["a"].cells) == 2)
            assert cells["a"].depth == 2
            # The circle would close here: the top at the bottom.
            loop = CellConfig(parent=bottom.endpoint, name="top")
            link = CellLink(loop, top.controller.broker, log("loop"), top.controller.link_idle, None, None)
            top.controller._cell = link
            await until(lambda: ("loop", "cell_refused", CellLoopError.code) in told)
            assert ("b", "peer_refused", CellLoopError.code) in told
            assert "top" not in bottom.controller.broker.registry.workers
            link.close()
            top.controller._cell = None
        # A controller that is its own parent.
        config = ControllerConfig(endpoints=(TCP,), broker=BrokerConfig(recovery_ms=0))
        async with Controller(config, log=log("self")) as alone:
            own = CellConfig(parent=alone.endpoints[0], name="self")
            alone._cell = CellLink(own, alone.broker, log("self"), alone.link_idle, None, None)
            await until(lambda: ("self", "cell_refused", CellLoopError.code) in told)
            assert ("self", "peer_refused", CellLoopError.code) in told


KEYRING = """
[boss]
role = "operator"
key = "boss.key"

[east]
role = "worker"
key = "east.key"
workers = ["east"]
models = ["echo"]
"""


async def test_a_cell_needs_a_workers_key_of_its_parent(tmp_path: Path) -> None:
    keys = make_keys(tmp_path, ("controller", "boss", "east"), KEYRING)
    config = ControllerConfig(
        endpoints=(TCP,),
        key=keys / "controller.key_secret",
        keyring=keys / "keyring.toml",
        broker=BrokerConfig(recovery_ms=0),
    )
    told: list[tuple[str, Any]] = []
    async with Controller(config) as controller:
        (endpoint,) = controller.endpoints
        own = credentials(keys, "east")
        async with (
            cell_of(endpoint, "east", credentials=own) as east,
            AsyncClient(endpoint, credentials=credentials(keys, "boss")) as client,
        ):
            await east.add_worker("w0", EchoWorker())
            await served(Fabric(endpoint, controller), "echo")
            assert (await client.generate("echo", "a", max_new_tokens=2)).text == words("a", 2)
        async with cell_of(
            endpoint, "west", credentials=own, log=lambda event, **it: told.append((event, it.get("code")))
        ):
            await until(lambda: ("cell_refused", errors.PermissionDeniedError.code) in told)


class Cached(EchoWorker):
    """Echo that tells what it has cached, without computing anything."""

    def tell(self, tokens: list[int], *, gone: bool = False) -> None:
        joined = token_hashes(tokens)
        blocks = [joined[at : at + 8] for at in range(0, len(joined), 8)]
        stored, removed = ([], blocks) if gone else (blocks, [])
        self.steps.cache_changed_threadsafe("echo", stored, removed, unit=PREFIX_BLOCK_TOKENS)


async def test_prefixes_that_workers_tell_of_lead_to_their_cell_while_one_of_them_has_them() -> None:
    tokens = list(range(8 * PREFIX_BLOCK_TOKENS))
    async with (
        fabric(TCP, policy="prefix_aware") as top,
        cell_of(top.endpoint, "east") as east,
        cell_of(top.endpoint, "west", policy="prefix_aware") as west,
        AsyncClient(top.endpoint) as client,
    ):
        engines = [Cached() for _ in range(3)]
        await east.add_worker("e0", EchoWorker())
        for number, engine in enumerate(engines):
            await west.add_worker(f"w{number}", engine)
        await served(top, "echo", by=2)
        index = top.controller.broker.registry.placement.index
        engines[1].tell(tokens)
        engines[2].tell(tokens)
        await until(lambda: len(index) == 8)
        for _ in range(4):
            answer = await client.generate("echo", prompt_token_ids=tokens, max_new_tokens=1, prefix_hints=True)
            assert answer.worker in ("w1", "w2")
        # One of two throws it away, then the other is gone: only then the cell has it no more.
        engines[1].tell(tokens, gone=True)
        engines[1].tell([7] * PREFIX_BLOCK_TOKENS)
        await until(lambda: len(index) == 9)
        engines[1].tell([7] * PREFIX_BLOCK_TOKENS, gone=True)
        await until(lambda: len(index) == 8)
        await west.remove_worker("w2")
        await until(lambda: not len(index))


async def test_a_parent_that_restarts_finds_the_streams_of_its_cells() -> None:
    async with fabric(TCP) as first, proxy(first.endpoint) as line, cell_of(line.endpoint, "east") as east:
        await east.add_worker("w0", EchoWorker(PACED))
        await served(first, "echo")
        async with AsyncClient(line.endpoint) as client:
            streams = [client.stream("echo", f"s{n} x", max_new_tokens=120, resume="never") for n in range(8)]
            for stream in streams:
                await anext(stream)
            # The connections of both, again and again.
            for _ in range(3):
                line.cut()
                await asyncio.sleep(0.1)
            for number, stream in enumerate(streams):
                assert (await stream).text == words(f"s{number} x", 120)
            figures = client.figures()
            assert figures["failovers"] == figures["gaps"] == 0


async def test_an_answer_that_ends_while_its_client_is_away_from_the_parent_is_there_when_it_is_back() -> None:
    async with fabric(TCP) as top, proxy(top.endpoint) as line, cell_of(top.endpoint, "east") as east:
        await east.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=1_000)))
        await served(top, "echo")
        async with AsyncClient(line.endpoint) as client:
            streams = [client.stream("echo", f"s{n} x", max_new_tokens=200, resume="never") for n in range(8)]
            for stream in streams:
                while stream.text.count(" ") < 150:
                    await anext(stream)
            line.cut()
            for number, stream in enumerate(streams):
                assert (await stream).text == words(f"s{number} x", 200)
            figures = client.figures()
            assert figures["failovers"] == figures["gaps"] == 0
            assert (await client.status()).dispatched == 8
