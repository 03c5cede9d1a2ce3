"""API keys: who may call, with which models, and as which client of the fabric."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from zfabric.errors import AuthenticationError, ConfigurationError, IncorrectKeyError, UnknownModelError

_SHA256_LENGTH: Final = 64


class ApiKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One entry of the file.

    Attributes:
        key: The secret itself; or else `sha256`.
        sha256: Of the secret, as 64 hexadecimal digits: so the file holds nothing to steal.
        models: Names that may be asked for; None for all.
        fabric_key: Name of the file with the secret key that the gateway shows the controller for this caller, made by
            `zfabric keys make`.
    """

    key: str | None = None
    sha256: str | None = None
    models: list[str] | None = None
    fabric_key: str | None = None

    def check_model(self, model: str) -> None:
        """Raises: UnknownModelError: It may not be asked for. To who may not, it does not exist."""
        if self.models is not None and model not in self.models:
            raise UnknownModelError(f"model {model!r} is not served", model=model)


class KeyTable:
    """Keys by the hash of their secret: the time a look-up takes tells nothing of a secret.

    Example:
        >>> KeyTable({"team": ApiKey(key="sk-1")}).find(b"Bearer sk-1")[0]
        'team'
    """

    def __init__(self, entries: dict[str, ApiKey]) -> None:
        self._by_hash: dict[str, tuple[str, ApiKey]] = {}
        for name, entry in entries.items():
            if (entry.key is None) == (entry.sha256 is None):
                raise ConfigurationError(f"key {name!r} has to have one of key and sha256", key=name)
            digest = entry.sha256 or _hash((entry.key or "").encode())
            if len(digest) != _SHA256_LENGTH or entry.key == "":
                raise ConfigurationError(f"key {name!r} is empty, or its sha256 is not 64 digits", key=name)
            if digest.lower() in self._by_hash:
                raise ConfigurationError(f"key {name!r} has the secret of another", key=name)
            self._by_hash[digest.lower()] = (name, entry)

    def __len__(self) -> int:
        return len(self._by_hash)

    def find(self, authorization: bytes | None) -> tuple[str, ApiKey]:
        """Whose key a header has: "Bearer" and the secret.

        Raises:
            AuthenticationError: There is none.
            IncorrectKeyError: Nobody has it.
        """
        scheme, _, secret = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not secret.strip():
            raise AuthenticationError("an API key is needed: send the header Authorization: Bearer KEY")
        found = self._by_hash.get(_hash(secret.strip()))
        if found is None:
            raise IncorrectKeyError("the API key is not known")
        return found

    @property
    def fabric_keys(self) -> Iterable[str | None]:
        """Each identity that the gateway has to have at the fabric, once."""
        return {entry.fabric_key for _, entry in self._by_hash.values()}


def read_keys(path: Path) -> KeyTable:
    """The file: a TOML table for each key, named as its holder.

    Raises:
        ConfigurationError: It cannot be read, or says what is none.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return KeyTable(msgspec.convert(tables, dict[str, ApiKey]))
    except (OSError, ValueError) as error:  # of msgspec and tomllib as well
        raise ConfigurationError(f"API keys {path} cannot be read: {error}", path=str(path)) from error


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
