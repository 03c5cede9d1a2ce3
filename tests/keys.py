"""Keys for tests: files of everybody's, a keyring, and a fabric that has them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from tests.fabric import Fabric, at_rest
from zfabric import Credentials
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.transport.curve import create_keys
from zfabric.transport.links import Log


def make_keys(directory: Path, names: Iterable[str], keyring: str) -> Path:
    """Key files of these names, and a keyring."""
    for name in names:
        create_keys(directory, name)
    (directory / "keyring.toml").write_text(keyring)
    return directory


def put_keyring(keys: Path, text: str) -> None:
    """Replace the keyring as whoever writes files well: in one step."""
    (keys / "new.toml").write_text(text)
    (keys / "new.toml").replace(keys / "keyring.toml")


def credentials(keys: Path, name: str, controller: str = "controller") -> Credentials:
    """What a client or worker of this name connects with."""
    return Credentials.load(keys / f"{name}.key_secret", keys / f"{controller}.key")


@contextlib.asynccontextmanager
async def guarded(endpoint: str, keys: Path, log: Log | None = None) -> AsyncIterator[Fabric]:
    """A controller with keys, and one worker that has one."""
    config = ControllerConfig(
        endpoints=(endpoint,),
        key=keys / "controller.key_secret",
        keyring=keys / "keyring.toml",
        broker=BrokerConfig(recovery_ms=0),
    )
    async with Controller(config, log=log) as controller:
        made = Fabric(controller.endpoints[0], controller)
        await made.add_worker("gpu-0", credentials=credentials(keys, "gpu"))
        try:
            yield made
            await at_rest(controller)
        finally:
            for name in list(made.services):
                await made.remove_worker(name)
