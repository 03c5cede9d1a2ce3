"""Taking connections: in bounded numbers, from sources that may connect, and with a pause when files run out."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Final

from zfabric import limits
from zfabric.transport.ipc import peer_uid
from zfabric.transport.links import Log
from zfabric.transport.loop_waiting import Admission
from zfabric.transport.loop_wire import Wire

#: What means that this process, or the host, has no room for another connection now.
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Takes what one listener has.

    Args:
        listener: Bound, listening, not blocking.
        make: Makes the protocol of a new connection from its source, and from what it has to get through.
        log: Told when files run out, once until they are there again.
        other_users: Whether an ipc listener takes connections of others than this user and root.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[str, Admission], Wire],
        log: Log,
        *,
        other_users: bool = False,
    ) -> None:
        self.pauses = 0
        self._listener = listener
        self.admission = Admission()
        self._make = make
        self._other_users = other_users
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._told = False
        self._paused: asyncio.TimerHandle | None = None
        self._starting: dict[asyncio.Task[None], socket.socket] = {}
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        for _ in range(limits.ACCEPT_BURST):
            try:
                accepted, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._pause(error)
                    return
                # Whoever wanted to connect is gone already.
                continue
            self._told = False
            source = self._source_of(accepted, address)
            if source is None:
                accepted.close()
                continue
            accepted.setblocking(False)
            wire = self._make(source, self.admission)
            self.admission.handshakes.begin(wire, source)
            task = self._loop.create_task(self._start(accepted, wire))
            self._starting[task] = accepted
            task.add_done_callback(self._started)

    def _source_of(self, accepted: socket.socket, address: object) -> str | None:
        """Where a connection comes from; None if it may not: a Unix socket is for its own user, and
        root, unless others may."""
        if accepted.family != socket.AF_UNIX:
            return str(address[0]) if isinstance(address, tuple) else ""
        uid = peer_uid(accepted)
        if uid not in (None, 0, os.geteuid()) and not self._other_users:
            self.admission.refused += 1
            return None
        return f"uid {uid}"

    async def _start(self, accepted: socket.socket, wire: Wire) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: wire, accepted)
        except OSError:
            accepted.close()
            wire.connection_lost(None)

    def _started(self, task: asyncio.Task[None]) -> None:
        accepted = self._starting.pop(task)
        if task.cancelled():
            # A task that was cancelled before its first step has closed nothing.
            accepted.close()

    def _pause(self, error: OSError) -> None:
        """Without a pause the loop would spin: the listener stays readable."""
        self.pauses += 1
        if not self._told:
            self._told = True
            self._log("accepting_paused", error=str(error), wait_ms=limits.ACCEPT_PAUSE_MS)
        self._loop.remove_reader(self._listener)
        self._paused = self._loop.call_later(limits.ACCEPT_PAUSE_MS / 1_000, self._resume)

    def _resume(self) -> None:
        self._paused = None
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Take no more."""
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._listener)
        for task in self._starting:
            task.cancel()
        self._listener.close()
