"""The adapters of a model: each is a model of its own to clients, by name; operators have them loaded and unloaded.

An adapter that is loaded under a name that another has replaces it, and one that is unloaded is found no more. Requests that run
then end with what they began with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

from zfabric.backends.front.adapter_directory import AdapterDirectory
from zfabric.backends.front.operator_calls import arguments_of
from zfabric.errors import Detail, RequestError, UnknownModelError
from zfabric.wire.payloads import OperateRequest


class LoadedAdapter(Protocol):
    """What is told of an adapter, whatever it is to its engine.

    Attributes:
        name: The model's name for clients.
        path: Where it was read from.
        rank: The greatest of its layers; None where its files do not tell.
        pinned: Whether the engine keeps it, whatever else is loaded. One that never drops any keeps all.
    """

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def pinned(self) -> bool: ...


_Adapter = TypeVar("_Adapter", bound=LoadedAdapter)


class Adapters(Generic[_Adapter]):
    """Those that requests can name. Any thread may look; one at a time may change them.

    Args:
        names: Of the model itself, aliases included: no adapter may have one of them.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = frozenset(names)
        self._by_name: dict[str, _Adapter] = {}

    def __iter__(self) -> Iterator[_Adapter]:
        return iter(self._by_name.values())

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._by_name)

    def get(self, name: str) -> _Adapter | None:
        """The adapter of this name, None if there is none."""
        return self._by_name.get(name)

    def find(self, model: str) -> _Adapter | None:
        """What a request for a model is to be computed with; None is the model itself.

        Raises:
            UnknownModelError: Neither: an adapter that was unloaded while the request waited, say. The model itself must
                not answer in its name.
        """
        found = self._by_name.get(model)
        if found is None and model and self._names and model not in self._names:
            raise UnknownModelError(f"no adapter {model!r} is loaded here any more", model=model)
        return found

    def check(self, name: str) -> None:
        """Raises: RequestError if an adapter may not have this name."""
        if not name or name in self._names:
            raise RequestError(f"{name!r} is the name of the model itself" if name else "the name is empty", name=name)

    def put(self, name: str, adapter: _Adapter, changed: Callable[[], None] | None = None) -> None:
        """Have requests find it, instead of another of its name.

        Args:
            changed: Told afterwards. If it raises, all is as before.

        Raises:
            RequestError: See `check`.
        """
        self.check(name)
        self._change({**self._by_name, name: adapter}, changed)

    def drop(self, name: str, changed: Callable[[], None] | None = None) -> _Adapter:
        """Have no more requests find it. Those that run go on with it.

        Raises:
            UnknownModelError: There is none of this name.
        """
        found = self._by_name.get(name)
        if found is None:
            raise UnknownModelError(f"no adapter {name!r} is loaded", model=name)
        self._change({known: one for known, one in self._by_name.items() if known != name}, changed)
        return found

    def _change(self, wanted: dict[str, _Adapter], changed: Callable[[], None] | None) -> None:
        before, self._by_name = self._by_name, wanted
        if changed is None:
            return
        try:
            changed()
        except BaseException:
            self._by_name = before
            raise


class AdapterLoader(Protocol[_Adapter]):
    """What an engine does of it."""

    async def load(self, name: str, path: str, *, pinned: bool) -> _Adapter:
        """Read an adapter and make it ready; nobody finds it yet. Raises: RequestError."""
        ...

    async def drop(self, adapter: _Adapter) -> None:
        """Forget an adapter that nobody finds any more, as soon as no request runs on it."""
        ...

    def users(self, adapter: _Adapter) -> int:
        """Requests that have it."""
        ...


class AdapterCalls(Generic[_Adapter]):
    """Operators' calls, the same on all engines that have adapters; they run one after another.

    Args:
        adapters: Those that requests can name.
        loader: The engine.
        base: The model's own name.
        changed: Called after the set of adapters has changed.
        offered: Those that are loaded by their name alone.
    """

    #: What there is to call.
    NAMES: Final = ("list_adapters", "load_adapter", "unload_adapter")

    def __init__(
        self,
        adapters: Adapters[_Adapter],
        loader: AdapterLoader[_Adapter],
        base: str,
        changed: Callable[[], None],
        offered: AdapterDirectory,
    ) -> None:
        self._offered = offered
        self._adapters = adapters
        self._loader = loader
        self._base = base
        self._changed = changed
        self._lock = asyncio.Lock()

    async def run(self, request: OperateRequest) -> dict[str, dict[str, Any]]:
        """`load_adapter` (name, path="", pinned=False), `unload_adapter` (name), `list_adapters`. Without a path an adapter is
        loaded that the worker offers.

        Returns:
            The adapters that there are then: {name: {path, base, rank, pinned, in_use}}, in the order of loading.

        Raises:
            RequestError: Arguments are others than it takes, the name is the model's own, or the adapter cannot be loaded.
            UnknownModelError: There is no such adapter, or none of this name is offered.
        """
        async with self._lock:
            if request.call == "load_adapter":
                await self._load(request)
            elif request.call == "unload_adapter":
                given = arguments_of(request, "name")
                await self._loader.drop(self._adapters.drop(given["name"], self._changed))
            else:
                arguments_of(request)
            return {adapter.name: self._told(adapter) for adapter in self._adapters}

    async def _load(self, request: OperateRequest) -> None:
        if self._offered.path is not None:
            given = arguments_of(request, "name", path="", pinned=False)
        else:
            given = arguments_of(request, "name", "path", pinned=False)
        path = given["path"] or await asyncio.to_thread(self._offered.path_of, given["name"])
        await self.load(given["name"], path, pinned=given["pinned"])

    async def load(self, name: str, path: str, *, pinned: bool = False) -> None:
        """Load an adapter, instead of another of its name. Raises: RequestError."""
        self._adapters.check(name)
        adapter = await self._loader.load(name, path, pinned=pinned)
        before = self._adapters.get(name)
        try:
            self._adapters.put(name, adapter, self._changed)
        except BaseException:
            await self._loader.drop(adapter)
            raise
        if before is not None:
            await self._loader.drop(before)

    def _told(self, adapter: _Adapter) -> dict[str, Any]:
        return {
            "path": adapter.path,
            "base": self._base,
            "rank": adapter.rank,
            "pinned": adapter.pinned,
            "in_use": self._loader.users(adapter),
        }


def adapter_details(adapter: LoadedAdapter, base: str) -> dict[str, Detail]:
    """What a model that is an adapter has among its details."""
    return {"base": base, "adapter": adapter.path, "rank": adapter.rank, "pinned": adapter.pinned}
