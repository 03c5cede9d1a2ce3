"""How a reader of answers is closed: by leaving its ``async with``, which a forked child may do without effect."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from zfabric.client import process
from zfabric.errors import ClosedError


class AsyncClosing(ABC):
    """An async context manager that ends with `aclose`."""

    _home: process.Process

    @abstractmethod
    async def aclose(self) -> None:
        """Stop what runs, and forget what was not read."""

    async def __aenter__(self) -> Self:
        process.check(self._home)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A child that leaves its parent's block has nothing to close.
        with contextlib.suppress(ClosedError):
            await self.aclose()
