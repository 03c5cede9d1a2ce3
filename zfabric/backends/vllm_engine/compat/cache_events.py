"""What vLLM publishes of its prefix cache, read on a thread: `vllm.distributed.kv_events`."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from zfabric.backends.front.cached import CacheTranslator
from zfabric.errors import ConfigurationError
from zfabric.worker.base import StepSink

#: How soon the thread notices that it is to end, in milliseconds.
_LOOK_MS = 100


class CacheEvents:
    """The events of one engine. Make it before the engine, so that it hears of the first block.

    Args:
        engine: vLLM's `AsyncEngineArgs`, which are told to publish them where only this user can read.

    Raises:
        ConfigurationError: The engine caches no prompts, has several ranks, or publishes its events elsewhere.
    """

    def __init__(self, engine: Any) -> None:
        if engine.kv_events_config is not None:
            raise ConfigurationError("--tell-cache and --kv-events-config are both given, but an engine tells it once")
        if engine.enable_prefix_caching is False:
            raise ConfigurationError(
                "--tell-cache is given with --no-enable-prefix-caching, which leaves nothing to tell"
            )
        if engine.data_parallel_size != 1:
            raise ConfigurationError(
                f"--tell-cache is given with {engine.data_parallel_size} data-parallel ranks, which have a cache each"
            )
        from vllm.config.kv_events import KVEventsConfig

        self._directory = tempfile.mkdtemp(prefix="zf-")
        endpoint = f"ipc://{self._directory}/cache.sock"
        engine.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.RCVTIMEO, _LOOK_MS)
        self._socket.set(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, models: Callable[[], list[str]], sink: Callable[[], StepSink]) -> None:
        """Tell from now on. Called on the event loop.

        Args:
            models: All that are served, the engine's own first.
            sink: Whom to tell.
        """
        given = (models, sink, asyncio.get_running_loop())
        self._thread = threading.Thread(target=self._run, args=given, name="cache-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Blocks for some 100 ms."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        self._socket.close(0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(
        self, models: Callable[[], list[str]], sink: Callable[[], StepSink], loop: asyncio.AbstractEventLoop
    ) -> None:
        translator = CacheTranslator(models()[0])
        try:
            self._read(translator, models, sink)
        except Exception as error:  # noqa: BLE001 — whatever vLLM publishes must not leave the controller with what was true once
            translator.cleared()
            translator.tell(models(), sink())
            told = f"{type(error).__name__}: {error}"
            loop.call_soon_threadsafe(lambda: sink().log("cache_events_lost", error=told))

    def _read(self, translator: CacheTranslator, models: Callable[[], list[str]], sink: Callable[[], StepSink]) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        batches = msgspec.msgpack.Decoder(KVEventBatch)
        expected = 0
        while not self._ending.is_set():
            try:
                _, counted, payload = self._socket.recv_multipart()
            except zmq.Again:
                continue
            number = int.from_bytes(counted, "big")
            if number != expected:
                # What was missed cannot be asked for, so nothing that was told before may be believed.
                translator.cleared()
            expected = number + 1
            for event in batches.decode(payload).events:
                _take(translator, event)
            translator.tell(models(), sink())


def _take(translator: CacheTranslator, event: Any) -> None:
    """One event. Those of other groups of layers, or of memory that is not the device's, tell nothing of what is at hand."""
    kind = type(event).__name__
    if kind == "AllBlocksCleared":
        translator.cleared()
    elif (getattr(event, "group_idx", None) or 0) != 0 or event.medium not in {None, "GPU"}:
        return
    elif kind == "BlockStored":
        translator.stored(
            event.block_hashes,
            event.parent_block_hash,
            event.token_ids,
            event.block_size,
            getattr(event, "lora_name", None),
            getattr(event, "extra_keys", None),
        )
    elif kind == "BlockRemoved":
        translator.removed(event.block_hashes)
