"""A program that uses the library's own asyncio client, on a simulated loop: callers, readers and what they see."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from zfabric.client.aio import AsyncClient
from zfabric.core.client.session import ClientSession
from zfabric.errors import FabricError, RequestCancelledError
from zfabric.testing.clients import Question
from zfabric.testing.network import Link, Network
from zfabric.testing.records import Record, Violation, Wish
from zfabric.testing.sockets import ProcessLoop, SimDealer
from zfabric.testing.tasks import TASKS
from zfabric.testing.world import World

#: Calls of the library that are not called as their questions are.
_CALLS: Final = {
    "model": "model_details",
    "drain": "drain_worker",
    "undrain": "undrain_worker",
    "pause": "pause_model",
    "resume": "resume_model",
    "cancel": "cancel_request",
    "kick": "kick_client",
    "config": "settings",
    "set_config": "change_setting",
}


class SimApp:
    """A process with one client, whose tasks make requests. Its interface is that of `SimClient`."""

    def __init__(self, world: World, network: Network, number: int) -> None:
        self.world = world
        self.networks = network.all
        self.number = number
        self.alive = True
        #: Since when it runs without a break.
        self.awake_ns = 0
        self.records: list[Record] = []
        self.questions: list[Question] = []
        self.dealer: SimDealer | None = None
        self.loop = ProcessLoop(world, self)  # type: ignore[abstract]
        self.client = AsyncClient(",".join(network.endpoint for network in self.networks))
        self.loop.call_soon(self.client.open)

    def connected(self, dealer: SimDealer) -> None:
        """Its socket was made."""
        self.dealer = dealer

    @property
    def link(self) -> Link | None:
        return self.dealer.link if self.dealer is not None else None

    @property
    def session(self) -> ClientSession:
        """Its client's own."""
        return self.client._connection.session

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, wish: Wish) -> Record:
        """Have a task make a request. Returns what becomes of it."""
        record = Record(wish, self.number, self.world.now_ns)
        self.records.append(record)
        self.loop.call_soon(lambda: self.loop.create_task(self._serve(record)))
        return record

    async def _serve(self, record: Record) -> None:
        wish = record.wish
        record.submitted_ns = self.world.now_ns
        work = self._generate(record) if wish.operation == "generate" else self._call(wish)
        task = self.loop.create_task(work)
        if wish.cancel_after_ms is not None:
            self.loop.call_later(wish.cancel_after_ms / 1_000, self._cancel, task, record)
        try:
            result = await task
        except FabricError as error:
            record.end(error, None)
        except asyncio.CancelledError:
            if not self.alive:
                raise
            record.end(RequestCancelledError("its task was cancelled"), None)
        else:
            record.end(None, result)

    def _cancel(self, task: asyncio.Task[Any], record: Record) -> None:
        if not record.endings and not task.done():
            record.cancelled = True
            task.cancel()

    async def _generate(self, record: Record) -> object:
        wish = record.wish
        stream = self.client.stream(
            wish.model,
            wish.prompt,
            deadline_ms=wish.deadline_ms,
            priority=wish.priority,
            resume=wish.resume,
            **wish.sampling,
        )
        if wish.cancel_after_ms == 0:
            # In the turn of its submission.
            record.cancelled = True
            stream.cancel()
        async for delta in stream:
            record.tokens(delta.text, delta.token_ids)
            if wish.read_delay_ms:
                await asyncio.sleep(wish.read_delay_ms / 1_000)
        return stream.usage

    async def _call(self, wish: Wish) -> object:
        client, timeout = self.client, None if wish.deadline_ms is None else wish.deadline_ms / 1_000
        if wish.operation == "embed":
            array = await client.embed(wish.model, [wish.prompt], timeout=timeout, priority=wish.priority)
            return array[0].tolist()
        if wish.operation == "count_tokens":
            return await client.count_tokens(wish.model, wish.prompt, timeout=timeout)
        if wish.operation in TASKS:
            return await TASKS[wish.operation].call(client, wish.model, wish.prompt, timeout=timeout)
        return await client.operate(wish.worker, "show", model=wish.model, prompt=wish.prompt, timeout=timeout)

    def ask(self, what: str, arguments: dict[str, object]) -> None:
        """Have a task ask the controller."""
        question = Question(what, self.number)
        self.questions.append(question)
        self.loop.call_soon(lambda: self.loop.create_task(self._ask(question, arguments)))

    async def _ask(self, question: Question, arguments: dict[str, Any]) -> None:
        client = self.client
        error = None
        try:
            call = getattr(client, _CALLS.get(question.what, question.what))
            name = [arguments.pop("name")] if question.what == "model" else []
            await call(*name, **arguments)
        except FabricError as failure:
            error = failure
        question.answered(error, [])

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def freeze(self, milliseconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        if self.alive:
            self.awake_ns = max(self.awake_ns, self.world.now_ns + int(milliseconds * 1e6))
            self.loop.freeze(self.awake_ns)

    def close(self) -> None:
        """Say goodbye. All that waited has ended soon."""
        if self.alive and not self.loop.frozen:
            self.loop.call_soon(lambda: self.loop.create_task(self._close()))

    async def _close(self) -> None:
        records = list(self.records)
        await self.client.close()
        # Late readers read what had come, and see the end then, as long as the process runs.
        awake_ns = -1
        while awake_ns != self.awake_ns:
            awake_ns = self.awake_ns
            await asyncio.sleep(1)
        unended = [record for record in records if record.endings != 1]
        if unended or self.session.busy:
            raise Violation(f"client {self.number} was closed, and left {unended}")
        self.alive = False

    def die(self) -> None:
        """SIGKILL: nobody reads any more, and nothing is owed."""
        self.alive = False
        if self.dealer is not None:
            self.dealer.kill()
        self.loop.kill()
