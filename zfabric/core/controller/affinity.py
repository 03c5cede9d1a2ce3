"""Where requests of a key went last, so that the next ones go there too: what they have in common is cached there.

The table is soft state. It is bounded, it forgets keys that are not used, and it is made anew from requests: those that are
dispatched, and those that clients claim and workers carry after a controller's restart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from zfabric.core.controller.hosting import Hosting, Model
from zfabric.ids import milliseconds
from zfabric.limits import AFFINITIES_MAX, AFFINITY_MODELS_MAX, AFFINITY_TTL_MS

_TTL_NS: Final = milliseconds(AFFINITY_TTL_MS)


class _Entry:
    """Where the requests of one key went: by model, the worker's name; and when the last one went."""

    __slots__ = ("used_ns", "workers")

    def __init__(self) -> None:
        self.workers: dict[str, str] = {}
        self.used_ns = 0


class Affinities:
    """Keys and their workers, the longest unused first. Each operation costs O(1), amortised."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def note(self, key: str, host: Hosting, now_ns: int) -> None:
        """A request of a key went to a host. The empty key is none."""
        if not key:
            return
        entry = self._entries.pop(key, None) or _Entry()
        self._forget_unused(now_ns)
        self._entries[key] = entry
        entry.used_ns = now_ns
        entry.workers.pop(host.model.name, None)
        while len(entry.workers) >= AFFINITY_MODELS_MAX:
            del entry.workers[next(iter(entry.workers))]
        entry.workers[host.model.name] = host.name
        if len(self._entries) > AFFINITIES_MAX:
            self._entries.popitem(last=False)

    def find(self, key: str, model: Model, now_ns: int) -> Hosting | None:
        """The host where requests of a key for a model went; None for no key, an unknown one, and where that host is gone or
        takes no requests."""
        entry = self._entries.get(key)
        if entry is None or now_ns - entry.used_ns >= _TTL_NS:
            return None
        host = model.hosts.get(entry.workers.get(model.name, ""))
        return host if host is not None and host.taking else None

    def release(self, key: str, allowed: Callable[[str], bool]) -> bool:
        """Forget where requests of a key went, for the models that are allowed. Returns whether anything was known."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        names = [name for name in entry.workers if allowed(name)]
        for name in names:
            del entry.workers[name]
        if not entry.workers:
            del self._entries[key]
        return bool(names)

    def _forget_unused(self, now_ns: int) -> None:
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if now_ns - entry.used_ns < _TTL_NS:
                return
            del self._entries[key]
