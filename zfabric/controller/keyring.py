"""The keys that a controller knows: a TOML file with a table a key."""

from __future__ import annotations

import tomllib
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec

from zfabric.core.controller.access import UNLIMITED, Grant, Limits, Role
from zfabric.errors import ConfigurationError
from zfabric.limits import FRAME_BYTES_MAX, PRIORITY_MAX, QUOTA_MAX
from zfabric.transport.curve import key_fault, load_public

#: The table whose tables are groups, so no key can be called so.
GROUPS: Final = "groups"
_Count = Annotated[int, msgspec.Meta(ge=1, le=QUOTA_MAX)]
_Rate = Annotated[float, msgspec.Meta(gt=0, le=QUOTA_MAX)]
_Priority = Annotated[int, msgspec.Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]
_LIMITS: Final = ("requests_in_flight", "requests_per_second", "tokens_per_minute")


class _Group(msgspec.Struct, forbid_unknown_fields=True):
    """What keys may have together."""

    requests_in_flight: _Count | None = None
    requests_per_second: _Rate | None = None
    tokens_per_minute: _Rate | None = None


_T = TypeVar("_T", bound=_Group)


class _Entry(_Group):
    """One table of the file."""

    role: Role = msgspec.field(default=Role.CLIENT)
    key: str = ""
    models: list[str] = []
    workers: list[str] = []
    expires: Any = None
    former: str = ""
    former_expires: Any = None
    group: str = ""
    priorities: tuple[_Priority, _Priority] | None = None
    prompt_bytes: Annotated[int, msgspec.Meta(ge=1, le=FRAME_BYTES_MAX)] | None = None


class Key(NamedTuple):
    """A key of the file: what it grants, until when (seconds since 1970, None for ever), and whether another follows it."""

    grant: Grant
    expires_s: float | None
    former: bool = False


class KeyRing:
    """Public keys (Z85) and what they grant.

    Args:
        keys: By key.
        files: Key files that the keys were read from.
    """

    def __init__(self, keys: dict[bytes, Key], files: tuple[Path, ...] = ()) -> None:
        self.keys: Final = keys
        self.files: Final = files

    @classmethod
    def load(cls, path: Path) -> KeyRing:
        """Read a file of tables such as::

            [backend-1]
            role = "client"           # client, worker, operator or observer
            key = "backend-1.key"     # a public key file beside this one, or the key itself
            expires = 2027-01-01      # optional: of no use from that day on (UTC), or from a time with its zone on
            models = ["chat-*"]       # optional: those it may ask, or serve; all by default
            workers = ["gpu-*"]       # optional, for a worker: the names it may take
            priorities = [0, 10]      # optional: those it may have; 0 … 1000 by default, an operator all of -1000 … 1000
            prompt_bytes = 100_000    # optional: what the body of a request may hold
            requests_in_flight = 8    # optional, as are the next two: beyond them a request is refused with RateLimitedError
            requests_per_second = 2
            tokens_per_minute = 6_000
            former = "backend-0.key"  # optional: the key before it, good for the same until `former_expires`
            former_expires = 2026-12-01

            [frontend]
            role = "client"
            key = "frontend.key"
            group = "shop"            # optional: shares the limits of a group, and its turns in queues, in place of own ones

            [groups.shop]
            tokens_per_minute = 60_000

        Raises:
            ConfigurationError: The file, a table or a key is not as it should be; the message names the table.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}", path=str(path)) from error
        return cls.parse(text, path)

    @classmethod
    def parse(cls, text: str, path: Path) -> KeyRing:
        """What `load` makes of a file with this text at this path. Raises: ConfigurationError."""
        try:
            tables = tomllib.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"{path} cannot be read: {error}", path=str(path)) from error
        reading = _Reading(path, tables)
        for name, table in tables.items():
            if name != GROUPS:
                reading.add(name, table)
        if not reading.keys:
            raise ConfigurationError(f"{path} names no key: nobody could connect", path=str(path))
        return cls(reading.keys, tuple(reading.files))

    def holds(self, key: bytes, now_s: float) -> bool:
        """Whether the key is known and has not expired. Args: now_s: Seconds since 1970."""
        found = self.keys.get(key)
        return found is not None and (found.expires_s is None or now_s < found.expires_s)

    def valid(self, now_s: float) -> frozenset[bytes]:
        """All keys that have not expired."""
        return frozenset(key for key in self.keys if self.holds(key, now_s))

    def grant(self, key: bytes) -> Grant | None:
        """What a key grants while it holds; None of an unknown one."""
        found = self.keys.get(key)
        return found.grant if found is not None else None

    def __len__(self) -> int:
        return len(self.keys)


class _Reading:
    """What is made of a file, table by table."""

    def __init__(self, path: Path, tables: dict[str, Any]) -> None:
        self.path = path
        self.keys: dict[bytes, Key] = {}
        self.files: list[Path] = []
        groups = tables.get(GROUPS, {})
        if not isinstance(groups, dict):
            raise ConfigurationError(f"{GROUPS} in {path} is no table of groups", path=str(path))
        self._groups = {
            name: _limits(self._converted(f"{GROUPS}.{name}", table, _Group)) for name, table in groups.items()
        }

    def add(self, name: str, table: Any) -> None:
        """Take a key's table. Raises: ConfigurationError."""
        entry = self._converted(name, table, _Entry)
        if not isinstance(table, dict) or "role" not in table or not entry.key:
            raise self._wrong(name, "needs a role and a key")
        if bool(entry.former) != (entry.former_expires is not None):
            raise self._wrong(name, "former and former_expires go together")
        grant = self._grant(name, entry)
        expires_s = self._seconds(name, "expires", entry.expires)
        self._put(name, self._public(name, entry.key), Key(grant, expires_s))
        if entry.former:
            ends = [
                it for it in (expires_s, self._seconds(name, "former_expires", entry.former_expires)) if it is not None
            ]
            self._put(name, self._public(name, entry.former), Key(grant, min(ends), former=True))

    def _grant(self, name: str, entry: _Entry) -> Grant:
        models, workers = tuple(entry.models) or ("*",), tuple(entry.workers) or ("*",)
        if entry.group and entry.group not in self._groups:
            raise self._wrong(name, f"there is no [{GROUPS}.{entry.group}]")
        if entry.group and _limits(entry) != UNLIMITED:
            raise self._wrong(name, f"{', '.join(_LIMITS)} belong into [{GROUPS}.{entry.group}]")
        if not entry.group and name in self._groups:
            raise self._wrong(name, f"is the name of a group too; say group = {name!r}, or call one of them otherwise")
        if entry.workers and entry.role is not Role.WORKER:
            raise self._wrong(name, f"workers is for the keys of workers, its role is {entry.role.value}")
        least = 0 if entry.role is Role.CLIENT else -PRIORITY_MAX
        priorities = entry.priorities or (least, PRIORITY_MAX)
        if priorities[0] > priorities[1]:
            raise self._wrong(name, f"priorities are {priorities[0]} … {priorities[1]}, the least comes first")
        limits = self._groups[entry.group] if entry.group else _limits(entry)
        return Grant(
            name, frozenset({entry.role}), models, workers, entry.group or name, limits, entry.prompt_bytes, priorities
        )

    def _put(self, name: str, key: bytes, known: Key) -> None:
        if key in self.keys:
            other = self.keys[key].grant.name
            raise ConfigurationError(f"[{name}] in {self.path} has the key of [{other}]", path=str(self.path))
        self.keys[key] = known

    def _public(self, name: str, given: str) -> bytes:
        # A key in Z85 may hold characters that no file name has, but it is never the name of a key file.
        if given.endswith(".key"):
            self.files.append(self.path.parent / given)
            key = load_public(self.files[-1])
        else:
            key = given.encode()
        fault = key_fault(key)
        if fault:
            raise self._wrong(name, f"key {fault}")
        return key

    def _seconds(self, name: str, what: str, given: object) -> float | None:
        if given is None:
            return None
        if not isinstance(given, date):
            raise self._wrong(name, f"{what} is no date, such as 2027-01-01")
        if not isinstance(given, datetime):
            given = datetime.combine(given, time(), UTC)
        if given.tzinfo is None:
            raise self._wrong(
                name, f"{what} is a time without its zone, {given.isoformat()}; write it as {given.isoformat()}Z"
            )
        return given.timestamp()

    def _converted(self, name: str, table: Any, kind: type[_T]) -> _T:
        try:
            return msgspec.convert(table, kind)
        except msgspec.ValidationError as error:
            raise self._wrong(name, str(error)) from error

    def _wrong(self, name: str, why: str) -> ConfigurationError:
        return ConfigurationError(f"[{name}] in {self.path}: {why}", path=str(self.path), key=name)


def _limits(of: _Group) -> Limits:
    return Limits(of.requests_in_flight, of.requests_per_second, of.tokens_per_minute)
