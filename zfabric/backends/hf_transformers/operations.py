"""What an operator can have a ModelWorker do while it serves: load and unload LoRA adapters, and take other weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zfabric.backends.front.adapter_directory import AdapterDirectory
from zfabric.backends.front.adapters import AdapterCalls
from zfabric.backends.front.operator_calls import no_such_call
from zfabric.backends.front.weight_files import WeightsDirectory
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.parameters.weights import Weights
from zfabric.backends.hf_transformers.setup.assembly import Assembled
from zfabric.backends.hf_transformers.weight_calls import WeightCalls
from zfabric.errors import ConfigurationError, RequestError, UnsupportedOperationError
from zfabric.wire.payloads import OperateRequest


class Operations:
    """The calls of one worker.

    Args:
        assembled: The running engine.
        base: The model's own name.
        changed: Called after the set of adapters has changed.
        offered: Adapters that are loaded by name.
        directory: Below which weights may be named.
        other_weights: Called when other weights are in place, with what they are called.
    """

    def __init__(
        self,
        assembled: Assembled,
        base: str,
        changed: Callable[[], None],
        offered: AdapterDirectory,
        directory: WeightsDirectory,
        other_weights: Callable[[str], None],
    ) -> None:
        self._assembled = assembled
        self._adapters: AdapterCalls[Adapter] = AdapterCalls(assembled.adapters, self, base, changed, offered)
        loaded = assembled.loaded
        weights = Weights(loaded.model, outside=loaded.pooler.has_layers)
        self.weights = WeightCalls(assembled.engine, weights, assembled.queue.restart, directory, other_weights)

    async def run(self, request: OperateRequest) -> Any:
        """Run a call; see `AdapterCalls.run` and `WeightCalls.run`.

        Raises:
            UnsupportedOperationError: There is no such call.
        """
        if self._assembled.ranks is not None:
            raise UnsupportedOperationError(
                "a model that is divided over ranks keeps its weights and has no adapters", operation="operate"
            )
        if request.call in WeightCalls.NAMES:
            return await self.weights.run(request)
        if request.call not in AdapterCalls.NAMES:
            raise no_such_call(request, "transformers", [*AdapterCalls.NAMES, *WeightCalls.NAMES])
        return await self._adapters.run(request)

    # ── what the engine does of it ──────────────────────────────────────────────────────────────────────────────────

    async def load(self, name: str, path: str, *, pinned: bool) -> Adapter:
        """See `AdapterLoader`. All adapters stay in the device's memory here, so all are as if they were pinned."""
        lora = self._assembled.lora
        try:
            adapter = await asyncio.to_thread(lora.read, name, Path(path), pinned=pinned)
        except ConfigurationError as error:
            raise RequestError(
                f"adapter {name!r} cannot be loaded from {path}: {error.message}", name=name, path=path
            ) from None
        await asyncio.wrap_future(self._assembled.engine.run_job(lambda: lora.install(adapter)))
        return adapter

    async def drop(self, adapter: Adapter) -> None:
        """Requests hold what they began with; it goes with the last of them."""

    def users(self, adapter: Adapter) -> int:
        """Requests that have it."""
        return self._assembled.engine.users(adapter) + self._assembled.queue.users(adapter)
