"""ZeroMQ contexts, and what has to be true of the library and the process before one is used.

A program that uses this library keeps its own limits and its own chance. Only the daemons, which are processes of the
project's own, change those of theirs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Final

import zmq

from zfabric.errors import ConfigurationError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: Older releases have known remote memory errors in the handshake.
_LIBZMQ_MIN: Final = (4, 3, 5)
#: glibc's numbers for mallopt(3), and the values that it comes to by itself once it has freed the largest block that it takes
#: them from: until then each body of a megabyte gives its pages back to the kernel, and the next one takes new ones, which
#: costs more than reading it does.
_KEPT_MEMORY: Final = ((-1, 64 * 1024 * 1024), (-3, 32 * 1024 * 1024))
#: Bytes of the C library's generator; so many make it one of its best.
_CHANCE_BYTES: Final = 256


def make_context(sockets_max: int = 4_096) -> zmq.Context[zmq.Socket[bytes]]:
    """A context of our own; make it after a fork, never before.

    Raises:
        ConfigurationError: libzmq is too old to be exposed to peers, or the system gives no more files.
    """
    if zmq.zmq_version_info() < _LIBZMQ_MIN:
        raise ConfigurationError(f"libzmq is {zmq.zmq_version()}, at least 4.3.5 is needed")
    try:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    except zmq.ZMQError as error:
        raise ConfigurationError(f"no ZeroMQ context can be made: {error}") from error
    context.set(zmq.MAX_SOCKETS, sockets_max)
    return context


def make_router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """A ROUTER whose routing ids cannot be guessed.

    libzmq counts them up from a number that it draws from rand(), and never seeds that. Whoever knew which comes next could
    claim it as an identity of his own, and libzmq ends the process at the collision.
    """
    with own_chance():
        return context.socket(zmq.ROUTER)


@contextlib.contextmanager
def own_chance() -> Iterator[None]:
    """Lend rand() a state of our own while libzmq makes a ROUTER or a REP, where the C library can: the program's own goes on
    as if nothing had been drawn. Elsewhere a program that embeds a controller has to call srand() itself, as the daemon
    does."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    assert library is not None
    library.initstate.argtypes = (ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t)
    library.initstate.restype = library.setstate.restype = ctypes.c_void_p
    library.setstate.argtypes = (ctypes.c_void_p,)
    own = ctypes.create_string_buffer(_CHANCE_BYTES)
    former = library.initstate(int.from_bytes(os.urandom(4), "little"), own, _CHANCE_BYTES)
    try:
        yield
    finally:
        library.setstate(former)


def keep_memory() -> None:
    """Have the C library keep up to 64 MiB of what large bodies leave, for the next ones, where it is glibc. For a daemon that
    passes bodies on, and has no other use for so much."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "gnu_get_libc_version"):
        assert library is not None
        for option, value in _KEPT_MEMORY:
            library.mallopt(option, value)


def file_limit() -> int | None:
    """How many files this process may have open, None where no system call tells."""
    return None if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def own_the_process() -> None:
    """What a daemon does to its process before it listens: as many open files as it may have, since every peer costs one and
    running out is fatal to an ipc listener; and chance that nobody can guess (see `make_router`)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
