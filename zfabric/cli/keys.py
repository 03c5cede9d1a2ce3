"""Keys and the keyring: make, list, rotate, remove."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import cyclopts
from rich.console import Console

from zfabric.cli.options import Config, Json
from zfabric.cli.tables import print_json, show
from zfabric.controller.keyring import KeyRing
from zfabric.core.controller.access import Role
from zfabric.errors import ConfigurationError
from zfabric.transport.curve import create_keys

RoleName = Literal["client", "worker", "operator", "observer"]
KeyringFile = Annotated[Path, cyclopts.Parameter(name="--keyring", help="The controller's keyring.")]


class KeyRow(NamedTuple):
    """One key of a keyring.

    Attributes:
        name: Of its table.
        role: What it may be.
        group: Whose limits it shares; its own where that is its name.
        key: Its public half.
        state: "valid", "former" for one that another has followed and that is still good, or "expired".
        expires: When it is of no use any more, "" for never.
    """

    name: str
    role: str
    group: str
    key: str
    state: str
    expires: str


def keys_make(
    name: str,
    /,
    *,
    directory: Annotated[
        Path | None, cyclopts.Parameter(help="Where the two files go; beside the keyring, or here.")
    ] = None,
    keyring: Annotated[
        Path | None, cyclopts.Parameter(help="A keyring to add the key to, made if it is not there.")
    ] = None,
    role: Annotated[RoleName | None, cyclopts.Parameter(help="What the key is to be in the keyring.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Make a key pair: NAME.key for a keyring, or for whoever dials a controller, and NAME.key_secret to keep.

    **Examples**

    `zfabric keys make controller` · `zfabric keys make gpu --keyring /etc/zfabric/keyring.toml --role worker`
    """
    if (keyring is None) != (role is None):
        raise ConfigurationError("keyring and role go together, only one of them is given")
    if keyring is not None and directory is not None:
        raise ConfigurationError("the files go beside the keyring, give no directory")
    public, secret = create_keys(directory or (keyring.parent if keyring is not None else Path()), name)
    if keyring is not None and role is not None:
        from zfabric.cli.keyring_edits import KeyRingFile

        try:
            KeyRingFile(keyring, new=True).add(name, Role(role))
        except BaseException:
            public.unlink()
            secret.unlink()
            raise
    _tell(public, secret, as_json=as_json)


def keys_list(*, keyring: KeyringFile = Path("keyring.toml"), as_json: Json = False, config: Config = None) -> None:
    """List the keys of a keyring, and until when each is good.

    **Examples**

    `zfabric keys list --keyring keyring.toml` · `zfabric keys list --keyring keyring.toml --json`
    """
    from zfabric.cli.keyring_edits import now

    ring, now_s = KeyRing.load(keyring), now().timestamp()
    rows: list[KeyRow] = []
    for key, known in ring.keys.items():
        good = ring.holds(key, now_s)
        expires = datetime.fromtimestamp(known.expires_s, UTC).isoformat() if known.expires_s is not None else ""
        state = ("former" if known.former else "valid") if good else "expired"
        role = ", ".join(sorted(known.grant.roles))
        rows.append(KeyRow(known.grant.name, role, known.grant.group, key.decode(), state, expires))
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    columns = [(name, lambda row, name=name: getattr(row, name)) for name in KeyRow._fields]
    show(rows, columns, as_json=False, empty="no keys")


def keys_rotate(
    name: str,
    /,
    *,
    keyring: KeyringFile = Path("keyring.toml"),
    overlap_h: Annotated[float, cyclopts.Parameter(help="Hours for which the former key stays good.")] = 24.0,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Make another key for NAME. Both are good until the overlap is over, then only the new one. A running controller sees
    the change by itself.

    **Examples**

    `zfabric keys rotate backend-1 --keyring keyring.toml` · `zfabric keys rotate gpu --keyring keyring.toml --overlap-h 1`
    """
    from zfabric.cli.keyring_edits import KeyRingFile, now

    if not 0 <= overlap_h <= 24 * 365:
        raise ConfigurationError(f"overlap_h is {overlap_h}, it must be 0 … {24 * 365} hours", parameter="overlap_h")
    public, secret, until = KeyRingFile(keyring).rotate(name, timedelta(hours=overlap_h), now())
    _tell(public, secret, as_json=as_json, former_expires=until.isoformat())


def keys_remove(
    name: str,
    /,
    *,
    keyring: KeyringFile = Path("keyring.toml"),
    former: Annotated[bool, cyclopts.Parameter(negative=(), help="Only the key before the last rotation.")] = False,
    config: Config = None,
) -> None:
    """Take a key out of a keyring. A running controller ends its connections within a second. Key files stay.

    **Examples**

    `zfabric keys remove backend-1 --keyring keyring.toml` · `zfabric keys remove gpu --keyring keyring.toml --former`
    """
    from zfabric.cli.keyring_edits import KeyRingFile

    KeyRingFile(keyring).remove(name, former=former)


def _tell(public: Path, secret: Path, *, as_json: bool, **more: str) -> None:
    if as_json:
        print_json({"public": str(public), "secret": str(secret), **more})
        return
    lines = [f"public key {public}", f"secret key {secret}"]
    lines += [f"{name.replace('_', ' ')} {value}" for name, value in more.items()]
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)
