"""Weights that are sent in parts: one file of safetensors, gathered on the worker's disk until it is whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from zfabric.errors import RequestError


class WeightTransfer:
    """At most one file on its way; a new one takes the place of one that was never finished. One call at a time.

    Args:
        size_max: Bytes that a file of the model's weights has at most.
    """

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._number = 0
        self._size = self._received = 0
        self._file: Any = None

    def start(self, size: int) -> int:
        """Begin a file.

        Args:
            size: Of all of it, in bytes.

        Returns:
            The number by which its parts are sent.

        Raises:
            RequestError: It is larger than the model's weights can be.
        """
        if not 0 < size <= self._size_max:
            raise RequestError(
                f"size is {size}, weights of this model have 1 … {self._size_max:,} bytes", parameter="size",
                limit=self._size_max,
            )  # fmt: skip
        self.drop()
        self._file = tempfile.NamedTemporaryFile(prefix="zfabric-weights-")  # noqa: SIM115 — kept until it is dropped
        self._number += 1
        self._size, self._received = size, 0
        return self._number

    def add(self, number: int, offset: int, data: bytes) -> int:
        """Enter a part.

        Returns:
            Bytes that are there now.

        Raises:
            RequestError: Another file was begun since, the part does not follow the last one, or is too long.
        """
        self._check(number)
        if offset != self._received or offset + len(data) > self._size:
            raise RequestError(
                f"a part of {len(data):,} bytes at {offset:,} was sent, {self._received:,} of {self._size:,} are there",
                received=self._received, size=self._size,
            )  # fmt: skip
        self._file.write(data)
        self._received += len(data)
        return self._received

    def whole(self, number: int) -> Path:
        """The file, once all of it is there; it stays until `drop`. Raises: RequestError."""
        self._check(number)
        if self._received != self._size:
            raise RequestError(
                f"weights are not whole: {self._received:,} of {self._size:,} bytes are there",
                received=self._received, size=self._size,
            )  # fmt: skip
        self._file.flush()
        return Path(self._file.name)

    def drop(self) -> None:
        """Forget the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _check(self, number: int) -> None:
        if self._file is None or number != self._number:
            raise RequestError(
                f"update {number} is not under way" + (f", {self._number} is" if self._file is not None else ""),
                update=number,
            )
