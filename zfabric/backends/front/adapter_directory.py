"""The directory whose adapters a worker offers: names are looked up among its entries, and are never made into a path."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from zfabric.errors import ConfigurationError, UnknownModelError
from zfabric.limits import NAME_LENGTH_MAX, WORKER_MODELS_MAX

#: What makes a directory an adapter, to PEFT and to vLLM.
_SETTINGS: Final = "adapter_config.json"


class AdapterDirectory:
    """Adapters as PEFT saves them, each in a directory of its own whose name is the adapter's.

    Args:
        path: Where they are; None for a worker that offers none.
        taken: Names that no adapter may have: the model's own.

    Attributes:
        path: As given.

    Raises:
        ConfigurationError: There is no such directory, or it holds more adapters than a worker may offer.
    """

    def __init__(self, path: Path | None, taken: tuple[str, ...] = ()) -> None:
        self.path = path
        self._taken = frozenset(taken)
        if path is not None and not path.is_dir():
            raise ConfigurationError(f"adapters_dir {path} is no directory", path=str(path))
        self.names()

    def names(self) -> list[str]:
        """Those that are there now, in order. Raises: ConfigurationError, there are too many."""
        found = self._found()
        if len(found) > WORKER_MODELS_MAX:
            raise ConfigurationError(
                f"adapters_dir {self.path} holds {len(found)} adapters, a worker may offer {WORKER_MODELS_MAX}"
            )
        return sorted(found)

    def path_of(self, name: str) -> str:
        """Where an adapter lies. Raises: UnknownModelError, the directory has none of this name."""
        found = self._found().get(name)
        if found is None:
            raise UnknownModelError(f"this worker offers no adapter {name!r}", model=name)
        return str(found)

    def _found(self) -> dict[str, Path]:
        if self.path is None:
            return {}
        try:
            entries = [entry for entry in self.path.iterdir() if (entry / _SETTINGS).is_file()]
        except OSError as error:
            raise ConfigurationError(f"adapters_dir {self.path} cannot be read: {error}") from error
        return {
            entry.name: entry
            for entry in entries
            if len(entry.name) <= NAME_LENGTH_MAX and entry.name.isprintable() and entry.name not in self._taken
        }
