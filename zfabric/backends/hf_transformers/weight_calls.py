"""Operators' calls for other weights, by the names that vLLM has for the same: read from files, or sent in parts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, cast

from zfabric.backends.front.operator_calls import arguments_of
from zfabric.backends.front.weight_files import ONE_FILE, WeightFiles, WeightsDirectory
from zfabric.backends.front.weight_transfer import WeightTransfer
from zfabric.backends.hf_transformers.parameters.weights import NewWeights, Weights
from zfabric.backends.hf_transformers.scheduling.engine import Engine
from zfabric.backends.hf_transformers.scheduling.weight_switch import MODES, SwitchMode
from zfabric.errors import RequestError
from zfabric.limits import FRAME_BYTES_GOAL, NAME_LENGTH_MAX
from zfabric.wire.payloads import OperateRequest


class WeightCalls:
    """The calls of one worker. Weights are read beside the engine's thread, one set after the other.

    Args:
        engine: Whose steps they come between.
        weights: Reads them.
        restart: Called on the engine's thread when they have changed, for what is computed beside its requests.
        directory: Below which paths are.
        changed: Called when other weights are in place, with what they are called.
    """

    #: What there is to call.
    NAMES: Final = ("reload_weights", "start_weight_update", "update_weights", "finish_weight_update")

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        restart: Callable[[], None],
        directory: WeightsDirectory,
        changed: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._weights = weights
        self._restart = restart
        self._directory = directory
        self._changed = changed
        self._transfer = WeightTransfer(weights.file_bytes_max)
        self._lock = asyncio.Lock()
        self._parts = asyncio.Lock()
        # A call that is cancelled leaves its thread to end, and the next one waits for it there.
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="zfabric-weights")

    async def run(self, request: OperateRequest) -> dict[str, Any]:
        """`reload_weights` (path, weight_version, mode="wait"); `start_weight_update` (size), `update_weights` (update, offset,
        data) for each part, and `finish_weight_update` (update, weight_version, mode="wait").

        Returns:
            Of `start_weight_update` {update, part_bytes}, of `update_weights` {received}; of the others, once the weights are in
            place, {weight_version, tensors, running, switch_ms}: how many requests ran then, and how long steps waited.

        Raises:
            RequestError: Arguments are others than it takes, or the weights do not fit; all is as it was then.
            UnsupportedOperationError: Weights of this model cannot be replaced, or not by path.
        """
        if request.call == "start_weight_update":
            size = arguments_of(request, size=0)["size"]
            self._weights.check()
            async with self._parts:
                number = await asyncio.to_thread(self._transfer.start, size)
            return {"update": number, "part_bytes": FRAME_BYTES_GOAL}
        if request.call == "update_weights":
            given = arguments_of(request, update=0, offset=0, data=b"")
            async with self._parts:
                part = (given["update"], given["offset"], given["data"])
                return {"received": await asyncio.to_thread(self._transfer.add, *part)}
        if request.call == "finish_weight_update":
            given = arguments_of(request, "weight_version", update=0, mode=MODES[0])
            return await self._finish(given["update"], *_labels(given))
        given = arguments_of(request, "path", "weight_version", mode=MODES[0])
        return await self._apply(lambda: self._directory.find(given["path"]), *_labels(given))

    def close(self) -> None:
        """Forget what was sent in parts."""
        self._transfer.drop()
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def _finish(self, update: int, version: str, mode: SwitchMode) -> dict[str, Any]:
        async with self._parts:
            path = self._transfer.whole(update)
            try:
                return await self._apply(lambda: WeightFiles({ONE_FILE: path}), version, mode)
            finally:
                self._transfer.drop()

    async def _apply(self, find: Callable[[], WeightFiles], version: str, mode: SwitchMode) -> dict[str, Any]:
        async with self._lock:
            loop = asyncio.get_running_loop()
            new: NewWeights = await loop.run_in_executor(self._reading, lambda: self._weights.read(find()))
            took_s = 0.0

            def change() -> None:
                nonlocal took_s
                began = time.monotonic()
                new.exchange()
                self._restart()
                took_s = time.monotonic() - began

            switched = self._engine.switch_weights(change, mode, version)
            switched.add_done_callback(lambda done: self._tell(done, version, loop))
            running = await asyncio.wrap_future(switched)
            return {
                "weight_version": version, "tensors": len(new), "running": running, "switch_ms": round(took_s * 1_000, 3),
            }  # fmt: skip

    def _tell(self, done: Future[int], version: str, loop: asyncio.AbstractEventLoop) -> None:
        """On the engine's thread. Weights that are in place are told of, whether or not anybody still waits for the call."""
        if not (done.cancelled() or done.exception() or loop.is_closed()):
            loop.call_soon_threadsafe(self._changed, version)


def _labels(given: dict[str, Any]) -> tuple[str, SwitchMode]:
    """Raises: RequestError."""
    version, mode = given["weight_version"], given["mode"]
    if len(version) > NAME_LENGTH_MAX:
        raise RequestError(
            f"weight_version has {len(version)} characters, limit is {NAME_LENGTH_MAX}", argument="weight_version"
        )
    if mode not in MODES:
        raise RequestError(f"mode is {mode!r}, it must be one of {', '.join(MODES)}", argument="mode")
    return version, cast("SwitchMode", mode)
