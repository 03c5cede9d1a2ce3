"""The adapters of a model: each is a model of its own to clients, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

from zfabric.errors import RequestError, UnknownModelError

_Adapter = TypeVar("_Adapter")


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
