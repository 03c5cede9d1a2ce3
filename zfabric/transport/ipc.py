"""Unix sockets: whose directory they lie in, who holds one, and who is at the other end.

Whoever may write to a socket's directory can put a socket of his own there, and gets what was meant for another. So a
controller keeps its socket in a directory for its user alone, and clients and workers look before each attempt to
connect. libzmq does not tell who is at the other end of a connection; the directory does. The event loop's links ask the kernel
as well.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import IO, Final

from zfabric.errors import ConfigurationError, EndpointInUseError

try:
    import fcntl
except ImportError:  # Windows, where endpoints of this kind are refused
    fcntl = None  # type: ignore[assignment]


#: What the kernel tells of a peer: process, user, group (unix(7), SO_PEERCRED).
_CREDENTIALS: Final = struct.Struct("3i")


class IpcLock:
    """Holds PATH.lock for life: whoever holds it may replace the socket's file, which libzmq does without asking.

    Args:
        path: Of the socket. Its directory is made if there is none.
        other_users: Whether others than this user may enter the directory.

    Raises:
        ConfigurationError: The directory is not this user's alone, or something else has the path.
        EndpointInUseError: Another controller holds the lock.
    """

    def __init__(self, path: str, *, other_users: bool = False) -> None:
        self._path = Path(path)
        prepare_ipc_directory(self._path, other_users=other_users)
        _check_replaceable(self._path)
        try:
            descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"{path}.lock cannot be opened: {error}", path=path) from error
        self._file: IO[str] = os.fdopen(descriptor, "r+", encoding="ascii")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise EndpointInUseError(
                f"ipc://{path} is in use by another controller", endpoint=f"ipc://{path}"
            ) from None

    def release(self) -> None:
        """Remove the socket, and let another have the path."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._file.close()


def prepare_ipc_directory(path: Path, *, other_users: bool = False) -> None:
    """Make the socket's directory, for its owner alone unless `other_users` may enter it.

    Raises:
        ConfigurationError: It cannot be made, belongs to somebody else, or others may enter it, or write to it.
    """
    forbidden = 0o022 if other_users else 0o077
    directory = path.parent
    try:
        directory.mkdir(mode=0o777 & ~forbidden, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be made: {error}", path=str(directory)) from error
    own = os.geteuid()
    if status.st_uid != own:
        raise ConfigurationError(
            f"{directory} belongs to uid {status.st_uid}, not to uid {own}", path=str(directory), owner=status.st_uid
        )
    if stat.S_IMODE(status.st_mode) & forbidden:
        raise ConfigurationError(
            f"{directory} has mode {stat.S_IMODE(status.st_mode):04o}, the socket's directory must be "
            f"{0o777 & ~forbidden:04o}",
            path=str(directory),
        )


def check_ipc_owner(path: Path) -> bool:
    """Make sure that only this user or root can have put a socket there. Ask before each attempt to connect: a directory
    that was not there a moment ago may be somebody else's now. The directories above it are not looked at.

    Returns:
        Whether there is a socket to connect to.

    Raises:
        ConfigurationError: Somebody else owns the directory or may write to it, or the path is no socket.
    """
    directory = path.parent
    try:
        # A link is as good as who made it: its target may be another one by the time of the connect.
        _check_owner(directory, directory.lstat())
        status = directory.stat()
        _check_owner(directory, status)
        others_write = status.st_mode & 0o022
        if others_write and not status.st_mode & stat.S_ISVTX:
            raise ConfigurationError(
                f"{directory} has mode {stat.S_IMODE(status.st_mode):04o}: others may put a socket there",
                path=str(directory),
            )
        entry = path.lstat()
        if others_write:
            _check_owner(path, entry)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be reached: {error}", path=str(path)) from error
    if stat.S_ISLNK(entry.st_mode):
        target = Path(os.path.realpath(path))
        if not target.is_symlink():
            return check_ipc_owner(target)
    if not stat.S_ISSOCK(entry.st_mode):
        raise ConfigurationError(f"{path} is there and is no socket", path=str(path))
    return True


def peer_uid(connected: socket.socket) -> int | None:
    """The user at the other end of a Unix socket, None where the system does not tell.

    Of who connected it is the user at that time, of who listens it is the user who called listen (unix(7)).
    """
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    _, uid, _ = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size))
    return int(uid)


def check_listener(connected: socket.socket, path: str) -> None:
    """Make sure that this user or root listens at a path: whose directory it lies in may have changed since it was looked at,
    and root may have let somebody else listen. Ask before anything is said.

    Raises:
        ConfigurationError: Somebody else listens there.
    """
    uid, own = peer_uid(connected), os.geteuid()
    if uid not in (None, 0, own):
        raise ConfigurationError(
            f"uid {uid} listens at {path}, neither this user (uid {own}) nor root: start the controller as uid {own}, or "
            "connect to the endpoint of a controller that this user runs; between users use tcp and keys",
            path=path,
            listener=uid,
        )


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigurationError(
            f"{path} belongs to uid {status.st_uid}, neither to this user nor to root: anybody may listen there",
            path=str(path),
            owner=status.st_uid,
        )


def _check_replaceable(path: Path) -> None:
    """libzmq removes whatever has the path of a socket that it binds."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigurationError(f"{path} is there and is no socket; nothing is replaced", path=str(path))
