"""What an operator can have a ModelWorker do while it serves: load and unload LoRA adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zfabric.backends.hf_transformers.assembly import Assembled
from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.wire.payloads import OperateRequest


class Operations:
    """The calls of one worker; they run one after another.

    Args:
        assembled: The running engine.
        changed: Called after the set of adapters has changed.
    """

    def __init__(self, assembled: Assembled, changed: Callable[[], None]) -> None:
        self._assembled = assembled
        self._changed = changed
        self._lock = asyncio.Lock()

    async def run(self, request: OperateRequest) -> Any:
        """Run a call. All return the adapters there are then, as {name: {path, rank}}.

        Raises:
            UnsupportedOperationError: There is no such call.
            RequestError: Its arguments are others than it takes, or the name is the model's own.
            UnknownModelError: There is no such adapter.
            ConfigurationError: The adapter cannot be read, or does not fit the model.
        """
        async with self._lock:
            arguments = request.arguments
            if request.call == "load_adapter":
                await self._load(_text(arguments, "name"), Path(_text(arguments, "path")))
            elif request.call == "unload_adapter":
                self._assembled.adapters.drop(_text(arguments, "name"), self._changed)
            elif request.call != "list_adapters":
                raise UnsupportedOperationError(
                    f"there is no call {request.call!r}, there are list_adapters, load_adapter, unload_adapter",
                    operation="operate",
                    call=request.call,
                )
            return {adapter.name: {"path": adapter.path, "rank": adapter.rank} for adapter in self._assembled.adapters}

    async def _load(self, name: str, path: Path) -> None:
        """An adapter of the same name is replaced; who runs on that goes on with it."""
        adapters, lora = self._assembled.adapters, self._assembled.lora
        adapters.check(name)
        adapter = await asyncio.to_thread(lora.read, name, path)
        await asyncio.wrap_future(self._assembled.engine.run_job(lambda: lora.install(adapter)))
        adapters.put(name, adapter, self._changed)


def _text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"argument {name} is {value!r}, it must be a text", argument=name)
    return value
