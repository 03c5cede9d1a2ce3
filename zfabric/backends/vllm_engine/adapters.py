"""LoRA adapters in the engine: who has one, when it can go, and that those in use have places beside those that are pinned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from zfabric.backends.vllm_engine.compat.lora import lora_request, rank_of
from zfabric.errors import FabricError, RequestError


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """See `LoadedAdapter`.

    Attributes:
        request: vLLM's `LoRARequest`, which goes with each request for text or vectors.
    """

    name: str
    path: str
    rank: int | None
    pinned: bool
    request: Any


class Lora:
    """The engine's adapters: an `AdapterLoader`.

    vLLM computes a batch with as many adapters as it has places (`--max-loras`). It does not count those that are pinned, so a
    batch that has none of them would find too few places, and the engine would die of it. Therefore, while any is pinned,
    requests whose adapters would be too many wait here, in line.

    Args:
        engine: An `AsyncLLM`.
        places: Adapters of one batch; 0 if the engine was started without `--enable-lora`.
    """

    def __init__(self, engine: Any, places: int) -> None:
        self._engine = engine
        self._places = places
        self._number = 0
        self._held: dict[str, Adapter] = {}
        #: vLLM's numbers of those that it keeps.
        self._pinned: set[int] = set()
        #: Those that nobody finds any more, and that requests still run on.
        self._leaving: set[Adapter] = set()
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()
        self._chores: set[asyncio.Task[None]] = set()

    # ── operators ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def load(self, name: str, path: str, *, pinned: bool) -> Adapter:
        """See `AdapterLoader`.

        Raises:
            RequestError: Adapters are not enabled, the engine cannot load it, or as many are pinned as may be.
        """
        if not self._places:
            raise RequestError("this worker was started without --enable-lora")
        if pinned and len(self._pinned) + 1 >= self._places:
            raise RequestError(
                f"{len(self._pinned)} adapters are pinned in {self._places} places (--max-loras), one has to stay free",
                name=name,
                places=self._places,
            )
        self._number += 1
        request = lora_request(name, self._number, path)
        try:
            await self._bring_in(request, pinned=pinned)
        except FabricError:
            raise
        except Exception as error:  # noqa: BLE001 — it comes from another process, as whatever that raised
            raise RequestError(
                f"adapter {name!r} cannot be loaded from {path}: {error}", name=name, path=path
            ) from None
        return Adapter(name, path, await asyncio.to_thread(rank_of, path), pinned, request)

    async def _bring_in(self, request: Any, *, pinned: bool) -> None:
        if not pinned:
            await self._engine.add_lora(request)
            return
        number = request.lora_int_id
        async with self._line:
            self._pinned.add(number)
            try:
                await self._room()
                await self._engine.add_lora(request)
                await self._engine.pin_lora(number)
            except BaseException:
                self._pinned.discard(number)
                await self._engine.remove_lora(number)
                raise

    async def drop(self, adapter: Adapter) -> None:
        """See `AdapterLoader`."""
        if self.users(adapter):
            self._leaving.add(adapter)
        else:
            await self._remove(adapter)

    async def _remove(self, adapter: Adapter) -> None:
        number = adapter.request.lora_int_id
        await self._engine.remove_lora(number)
        self._pinned.discard(number)
        self._freed.set()

    def users(self, adapter: Adapter) -> int:
        """Requests that have it."""
        return sum(held is adapter for held in self._held.values())

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def hold(self, request_id: str, adapter: Adapter | None) -> Any:
        """Keep an adapter in the engine until `release`, and wait until there is a place for it. Returns vLLM's request."""
        if adapter is None:
            return None
        if self._pinned and not adapter.pinned:
            async with self._line:
                await self._room(adapter.request.lora_int_id)
        self._held[request_id] = adapter
        return adapter.request

    def release(self, request_id: str) -> None:
        """The request has ended, or never began."""
        adapter = self._held.pop(request_id, None)
        if adapter is None:
            return
        self._freed.set()
        if adapter in self._leaving and not self.users(adapter):
            self._leaving.discard(adapter)
            task = asyncio.get_running_loop().create_task(self._remove(adapter))
            self._chores.add(task)
            task.add_done_callback(self._chores.discard)

    @asynccontextmanager
    async def using(self, request_id: str, adapter: Adapter | None) -> AsyncIterator[Any]:
        """Hold an adapter meanwhile."""
        try:
            yield await self.hold(request_id, adapter)
        finally:
            self.release(request_id)

    async def _room(self, *more: int) -> None:
        """Until those in use, those that are pinned, and one more have places, or none is pinned."""
        while self._pinned:
            numbers = {adapter.request.lora_int_id for adapter in self._held.values()}
            if len(numbers | self._pinned | set(more)) <= self._places:
                return
            self._freed.clear()
            await self._freed.wait()
