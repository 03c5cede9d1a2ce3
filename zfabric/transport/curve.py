"""Encryption and identity: CURVE keys (ZeroMQ RFC 26), from files in the form that pyzmq's own tools write."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from zfabric.errors import ConfigurationError
from zfabric.transport.context import own_chance

#: Name a client's or worker's own secret key file, and the controller's public one.
KEY_VARIABLE: Final = "ZFABRIC_KEY"
CONTROLLER_KEY_VARIABLE: Final = "ZFABRIC_CONTROLLER_KEY"
#: A domain makes libzmq ask the ZAP handler even without keys, and with a handler only ZMTP 3 gets through: without
#: one, older handshakes and plain garbage would surface as messages.
ZAP_DOMAIN: Final = "zfabric"
#: Length of a key in Z85, its printable form.
_Z85_LENGTH: Final = 40


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A long-term key, in Z85. The secret half is never shown."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client or worker proves itself by, and the public key that the controller has to have."""

    keys: KeyPair
    controller: bytes

    @classmethod
    def load(cls, key: Path | str, controller_key: Path | str) -> Credentials:
        """Read both files.

        Raises:
            ConfigurationError: One is missing, is not a key file, or is a secret that others may read.
        """
        return cls(load_secret(Path(key)), load_public(Path(controller_key)))


@dataclass(frozen=True, slots=True)
class ControllerKeys:
    """The controller's own key, and which public keys (Z85) may connect."""

    keys: KeyPair
    allows: Callable[[bytes], bool]


def default_credentials() -> Credentials | None:
    """Those that $ZFABRIC_KEY and $ZFABRIC_CONTROLLER_KEY name, None without both.

    Raises:
        ConfigurationError: Only one of them is set, or as of `Credentials.load`.
    """
    key, controller = os.environ.get(KEY_VARIABLE), os.environ.get(CONTROLLER_KEY_VARIABLE)
    if not key and not controller:
        return None
    return credentials_of(key, controller)


def credentials_of(key: Path | str | None, controller_key: Path | str | None) -> Credentials | None:
    """Credentials from two files that go together, `default_credentials` without either.

    Raises:
        ConfigurationError: Only one is given, or as of `Credentials.load`.
    """
    if key is None and controller_key is None:
        return default_credentials()
    if not key or not controller_key:
        raise ConfigurationError(
            f"a key of one's own (${KEY_VARIABLE}) and the controller's public key (${CONTROLLER_KEY_VARIABLE}) go "
            "together, only one of them is given"
        )
    return Credentials.load(key, controller_key)


def create_keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Write a new key pair, the secret for its owner alone.

    Returns:
        The public file, NAME.key, and the secret one, NAME.key_secret.

    Raises:
        ConfigurationError: One of the files exists, or cannot be written.
    """
    public, secret = directory / f"{name}.key", directory / f"{name}.key_secret"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made where nobody else looks, so that the secret is at no moment open to others.
        with tempfile.TemporaryDirectory(dir=directory) as private:
            made = [Path(made).read_bytes() for made in zmq.auth.create_certificates(private, name)]
        _write_new(secret, made[1], 0o600)
        try:
            _write_new(public, made[0], 0o644)
        except BaseException:
            secret.unlink()
            raise
    except FileExistsError as error:
        raise ConfigurationError(f"{error.filename} exists; a key is never overwritten", path=error.filename) from None
    except OSError as error:
        raise ConfigurationError(f"no key can be written to {directory}: {error}", path=str(directory)) from error
    return public, secret


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that was not there. Raises: OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def load_public(path: Path) -> bytes:
    """The public key of a file, Z85. Raises: ConfigurationError."""
    return _load(path)[0]


def load_secret(path: Path) -> KeyPair:
    """The pair of a secret file. Raises: ConfigurationError, also if others than its owner may read it."""
    public, secret = _load(path)
    if secret is None:
        raise ConfigurationError(f"{path} holds no secret key; give the file that ends in .key_secret", path=str(path))
    if path.stat().st_mode & 0o077:
        raise ConfigurationError(f"{path} may be read by others, its mode has to be 0600", path=str(path))
    return KeyPair(public, secret)


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not a key file: {error}", path=str(path)) from error
    for key in (public, secret):
        fault = key_fault(key) if key is not None else ""
        if fault:
            raise ConfigurationError(f"{path} holds a key that {fault}", path=str(path))
    return public, secret


def key_fault(key: bytes) -> str:
    """What is wrong with a key in Z85, as the rest of a sentence; "" if nothing is."""
    if len(key) != _Z85_LENGTH:
        return f"has {len(key)} characters, not {_Z85_LENGTH}"
    try:
        z85.decode(key)
    except (KeyError, ValueError, OverflowError, struct.error):
        return "is not in Z85, the form of ZeroMQ's keys"
    return ""


class _Allowed:
    """What pyzmq's ZAP handler asks."""

    def __init__(self, keys: ControllerKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a public key may connect."""
        return self._keys.allows(key)


def start_authenticator(context: zmq.Context[Any], keys: ControllerKeys | None) -> ThreadAuthenticator:
    """Answer libzmq's question who may connect; without keys everybody may who can reach the endpoint."""
    authenticator = ThreadAuthenticator(context)
    with own_chance():
        authenticator.start()
    if keys is not None:
        authenticator.configure_curve_callback(domain=ZAP_DOMAIN, credentials_provider=_Allowed(keys))
    return authenticator


def set_controller_keys(socket: zmq.Socket[bytes], keys: ControllerKeys) -> None:
    """Let only CURVE through on a ROUTER."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.keys.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.keys.public)


def set_credentials(socket: zmq.Socket[bytes], credentials: Credentials) -> None:
    """Make a DEALER prove itself, and demand that the controller does."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, credentials.controller)
    socket.setsockopt(zmq.CURVE_SECRETKEY, credentials.keys.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, credentials.keys.public)
