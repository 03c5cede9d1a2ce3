"""Backends of a third party, each with a way of its own to be made or to fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from zfabric import BaseModelWorker, ModelInfo


class SelfParsing(BaseModelWorker):
    """Parses what is left of the command line by itself, as engines with a parser of their own do."""

    def __init__(self, argv: list[str], settings: dict[str, Any]) -> None:
        self.argv = argv
        self.settings = settings

    @classmethod
    def from_arguments(cls, argv: Sequence[str], settings: Mapping[str, Any]) -> SelfParsing:
        return cls(list(argv), dict(settings))

    async def load(self) -> ModelInfo:
        return ModelInfo(name="self-parsing", capabilities=[])


class Endless(BaseModelWorker):
    """Loads for ever, in a thread as the contract asks for."""

    async def load(self) -> ModelInfo:
        await asyncio.to_thread(threading.Event().wait)
        raise AssertionError("an event that nobody sets was set")


class Broken(BaseModelWorker):
    """Fails with something that is no FabricError."""

    async def load(self) -> ModelInfo:
        raise ZeroDivisionError("the file has no weights")


class Lacking(BaseModelWorker):
    """Needs what is not installed."""

    async def load(self) -> ModelInfo:
        import an_engine_that_is_not_installed  # type: ignore[import-not-found]

        return ModelInfo(name=str(an_engine_that_is_not_installed), capabilities=[])


class Unannounceable(BaseModelWorker):
    """Names a model that no controller takes."""

    async def load(self) -> ModelInfo:
        return ModelInfo(name="m" * 300)


class TooMany(BaseModelWorker):
    """Serves more models than a worker may."""

    async def load(self) -> list[ModelInfo]:
        return [ModelInfo(name=f"m{number}") for number in range(2_000)]


class Twice(BaseModelWorker):
    """Gives two models one name."""

    async def load(self) -> list[ModelInfo]:
        return [ModelInfo(name="m"), ModelInfo(name="n", aliases=["m"])]
