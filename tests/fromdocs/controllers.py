"""A real controller on a thread, for peers that block."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig


class ControllerThread:
    """Listens while its block is open; the next one at the same endpoint is a controller that was started anew."""

    def __init__(self, endpoint: str, *, keys: Path | None = None, recovery_ms: int = 0) -> None:
        self.config = ControllerConfig(
            endpoints=(endpoint,),
            key=keys / "controller.key_secret" if keys is not None else None,
            keyring=keys / "keyring.toml" if keys is not None else None,
            broker=BrokerConfig(recovery_ms=recovery_ms, beat_ms=200, lease_ms=2_000),
        )
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        async with Controller(self.config) as controller:
            self._controller = controller
            self._ready.set()
            await self._stopping.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(20)

    @property
    def endpoint(self) -> str:
        return self._controller.endpoints[0]
