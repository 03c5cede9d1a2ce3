"""ZeroMQ contexts, and what has to be true of the library and the process before one is used."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from typing import Final

import zmq

from zfabric.errors import ConfigurationError

#: Older releases have known remote memory errors in the handshake.
_LIBZMQ_MIN: Final = (4, 3, 5)


def make_context(sockets_max: int = 4_096) -> zmq.Context[zmq.Socket[bytes]]:
    """A context of our own; make it after a fork, never before.

    Raises:
        ConfigurationError: libzmq is too old to be exposed to peers.
    """
    if zmq.zmq_version_info() < _LIBZMQ_MIN:
        raise ConfigurationError(f"libzmq is {zmq.zmq_version()}, at least 4.3.5 is needed")
    _seed_libzmq()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, sockets_max)
    return context


def raise_file_limit() -> int:
    """Raise the soft limit on open files to the hard one; running out of files is fatal to an ipc listener.

    Returns:
        The limit now in force.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _seed_libzmq() -> None:
    """libzmq draws routing ids and reconnect jitter from rand(), and never seeds it: ids would be guessable, and all
    processes would reconnect in step."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))
