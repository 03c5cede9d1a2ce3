"""Changes of a keyring's file that leave its comments and its order alone, each in one step and only if the result is one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import tomlkit
from tomlkit.exceptions import TOMLKitError

from zfabric.controller.keyring import KeyRing
from zfabric.core.controller.access import Role
from zfabric.errors import ConfigurationError
from zfabric.transport.clock import unix_ns
from zfabric.transport.curve import create_keys

#: Names of key files that a rotation tries before it gives up.
_ROTATIONS_MAX: Final = 10_000


class KeyRingFile:
    """A keyring that is changed.

    Args:
        path: The file.
        new: Whether it may be missing, since its first key is added.

    Raises:
        ConfigurationError: It cannot be read.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8") if path.exists() or not new else ""
            self._document = tomlkit.parse(text)
        except (OSError, ValueError, TOMLKitError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}", path=str(path)) from error

    def add(self, name: str, role: Role) -> None:
        """Add a key whose file NAME.key lies beside the keyring. Raises: ConfigurationError."""
        if name in self._document:
            raise ConfigurationError(
                f"{self.path} has a [{name}] already; see `zfabric keys rotate`", path=str(self.path)
            )
        table = tomlkit.table()
        table["role"] = role.value
        table["key"] = f"{name}.key"
        if self._document.body:
            self._document.add(tomlkit.nl())
        self._document[name] = table
        self._write()

    def rotate(self, name: str, overlap: timedelta, now: datetime) -> tuple[Path, Path, datetime]:
        """Make another key for a table; the one that it had stays good for so long.

        Returns:
            The new public file and the new secret one, beside the keyring, and until when the former key is good.

        Raises:
            ConfigurationError: There is no such table, or the key before its last rotation is still good.
        """
        table = self._table(name)
        former_expires = table.get("former_expires")
        if former_expires is not None and self._is_good(name, now):
            raise ConfigurationError(
                f"[{name}] in {self.path} has a former key that is good until {former_expires}; take it out first: "
                f"zfabric keys remove {name} --former",
                path=str(self.path),
            )
        until = (now + overlap).replace(microsecond=0)
        public, secret = self._new_files(name)
        try:
            table["former"] = table["key"]
            table["former_expires"] = until
            table["key"] = public.name
            self._write()
        except BaseException:
            public.unlink()
            secret.unlink()
            raise
        return public, secret, until

    def remove(self, name: str, *, former: bool = False) -> None:
        """Take a key out with its table, or only the `former` one of a rotation. Key files stay. Raises: ConfigurationError."""
        table = self._table(name)
        if not former:
            del self._document[name]
        elif "former" in table:
            del table["former"]
            del table["former_expires"]
        else:
            raise ConfigurationError(f"[{name}] in {self.path} has no former key", path=str(self.path))
        self._write()

    def _table(self, name: str) -> Any:
        KeyRing.load(self.path)
        table = self._document.get(name)
        if table is None:
            raise ConfigurationError(f"{self.path} has no [{name}]", path=str(self.path))
        return table

    def _is_good(self, name: str, now: datetime) -> bool:
        ring = KeyRing.load(self.path)
        return any(
            known.former and known.grant.name == name and ring.holds(key, now.timestamp())
            for key, known in ring.keys.items()
        )

    def _new_files(self, name: str) -> tuple[Path, Path]:
        directory = self.path.parent
        for number in range(2, _ROTATIONS_MAX):
            if not any((directory / f"{name}-{number}.{end}").exists() for end in ("key", "key_secret")):
                return create_keys(directory, f"{name}-{number}")
        raise ConfigurationError(f"{directory} holds {_ROTATIONS_MAX} keys of {name!r}", path=str(directory))

    def _write(self) -> None:
        """Put the new text in the place of the old one, once it is known to be a keyring."""
        text = tomlkit.dumps(self._document)
        KeyRing.parse(text, self.path)
        try:
            mode = self.path.stat().st_mode & 0o777 if self.path.exists() else 0o644
            descriptor, made = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}-")
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be written: {error}", path=str(self.path)) from error
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(made, mode)
            os.replace(made, self.path)
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be written: {error}", path=str(self.path)) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made)


def now() -> datetime:
    """The time that expiry dates are compared with."""
    return datetime.fromtimestamp(unix_ns() / 1e9, UTC)
