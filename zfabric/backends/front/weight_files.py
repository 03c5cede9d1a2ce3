"""The directory below which operators may name weights, and the files of safetensors that such a name stands for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zfabric.errors import ConfigurationError, RequestError, UnsupportedOperationError

#: How transformers names weights: in one file, or in several that an index names.
ONE_FILE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where weights lie.

    Attributes:
        files: By the names that transformers reads them under.
        config: The model's configuration that was saved with them; None for a file alone.
    """

    files: dict[str, Path]
    config: Path | None = None

    @contextmanager
    def as_directory(self) -> Iterator[Path]:
        """A directory that has these files and nothing else, as long as the context lasts."""
        with tempfile.TemporaryDirectory(prefix="zfabric-weights-") as directory:
            for name, path in self.files.items():
                (Path(directory) / name).symlink_to(path)
            yield Path(directory)

    @property
    def tensor_files(self) -> list[Path]:
        """Those that hold tensors."""
        return [path for name, path in self.files.items() if name != INDEX]


class WeightsDirectory:
    """Weights that operators may have loaded by a path: those below this directory, wherever links lead.

    Args:
        path: The directory; None for a worker that loads none by path.

    Raises:
        ConfigurationError: There is no such directory.
    """

    def __init__(self, path: Path | None) -> None:
        if path is not None and not path.is_dir():
            raise ConfigurationError(f"weights_dir {path} is no directory", path=str(path))
        self._root = None if path is None else path.resolve()

    def find(self, given: str) -> WeightFiles:
        """What a path stands for: a file of safetensors, or a directory that transformers has saved a model in.

        Args:
            given: Below the directory; relative to it, or absolute.

        Raises:
            UnsupportedOperationError: The worker loads no weights by path.
            RequestError: The path leads out of the directory, or to no such weights.
        """
        if self._root is None:
            raise UnsupportedOperationError(
                "this worker was started without --weights-dir, it loads no weights by path", operation="operate"
            )
        path = self._below(self._root / given, given)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise RequestError(f"path {given!r} is no file of safetensors", path=given)
            return WeightFiles({ONE_FILE: path})
        names = [ONE_FILE]
        if not (path / ONE_FILE).is_file():
            names = [INDEX, *self._shards(path / INDEX, given)]
        files = {name: self._below(path / name, given) for name in names}
        config = path / "config.json"
        return WeightFiles(files, self._below(config, given) if config.is_file() else None)

    def _below(self, path: Path, given: str) -> Path:
        """The file itself. Raises: RequestError."""
        try:
            found = path.resolve(strict=True)
        except (OSError, ValueError) as error:
            raise RequestError(f"path {given!r} cannot be read: {error}", path=given) from None
        if self._root is None or not found.is_relative_to(self._root):
            raise RequestError(f"path {given!r} leads out of the directory of weights", path=given)
        return found

    def _shards(self, index: Path, given: str) -> list[str]:
        """The files that an index names. Raises: RequestError."""
        try:
            text = self._below(index, given).read_text(encoding="utf-8")
            names = sorted({str(name) for name in json.loads(text)["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestError(
                f"path {given!r} holds neither {ONE_FILE} nor an {INDEX} that can be read: {error}", path=given
            ) from None
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise RequestError(
                    f"path {given!r} has an index that names {name!r}, which is no file in it", path=given
                )
        return names
