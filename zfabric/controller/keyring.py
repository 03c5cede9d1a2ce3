"""The keys that a controller knows: a TOML file with a table a key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from zfabric.core.controller.access import Grant, Role
from zfabric.errors import ConfigurationError
from zfabric.transport.curve import key_fault, load_public


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One table of the file."""

    role: Role
    key: str
    models: list[str] = []
    workers: list[str] = []


class KeyRing:
    """Public keys (Z85) and what they grant.

    Args:
        grants: By key.
    """

    def __init__(self, grants: dict[bytes, Grant]) -> None:
        self._grants: Final = grants

    @classmethod
    def load(cls, path: Path) -> KeyRing:
        """Read a file of tables such as::

            [backend-1]
            role = "client"           # client, worker or operator
            key = "backend-1.key"     # a public key file beside this one, or the key itself
            models = ["chat-*"]       # optional: those it may ask, or serve; all by default
            workers = ["gpu-*"]       # optional, for a worker: the names it may take

        Raises:
            ConfigurationError: The file, a table or a key is not as it should be; the message names the table.
        """
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}", path=str(path)) from error
        grants: dict[bytes, Grant] = {}
        for name, table in tables.items():
            key, grant = _grant(path, name, table)
            if key in grants:
                raise ConfigurationError(f"[{name}] in {path} has the key of [{grants[key].name}]", path=str(path))
            grants[key] = grant
        if not grants:
            raise ConfigurationError(f"{path} names no key: nobody could connect", path=str(path))
        return cls(grants)

    def allows(self, key: bytes) -> bool:
        """Whether the key is known."""
        return key in self._grants

    def grant(self, key: bytes) -> Grant:
        """What a known key grants; an unknown one never gets a connection."""
        return self._grants[key]

    def __len__(self) -> int:
        return len(self._grants)


def _grant(path: Path, name: str, table: Any) -> tuple[bytes, Grant]:
    try:
        entry = msgspec.convert(table, _Entry)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"[{name}] in {path}: {error}", path=str(path), key=name) from error
    file = path.parent / entry.key
    # A key in Z85 may hold characters that no file name has, but it is never the name of a key file.
    key = load_public(file) if entry.key.endswith(".key") else entry.key.encode()
    fault = key_fault(key)
    if fault:
        raise ConfigurationError(f"[{name}] in {path}: key {fault}", path=str(path), key=name)
    models, workers = tuple(entry.models) or ("*",), tuple(entry.workers) or ("*",)
    return key, Grant(name, frozenset({entry.role}), models, workers)
