"""Keeps a DEALER connected to one controller: which address is tried when, and what it means that a try failed.

libzmq would try again by itself, but it knows one address of a name, does not look whose directory an ipc socket lies in,
and never comes back after some handshakes. So its own retries are off, and each try begins here: it is told an address, its
monitor tells what became of it, and before the next try it is told to forget the address.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from pathlib import Path
from typing import Final

import zmq

from zfabric import limits
from zfabric.errors import ConfigurationError, FabricError
from zfabric.transport.endpoints import Endpoint, parse_endpoint
from zfabric.transport.greeting import exchange_mechanisms
from zfabric.transport.ipc import check_ipc_owner
from zfabric.transport.monitor import Happened
from zfabric.transport.refusals import NO_KEYS_HERE, NO_KEYS_THERE, OTHER_KEY, UNKNOWN_KEY, Refusal, refused
from zfabric.transport.targets import Targets, unknown

_HANDSHAKE_FAILURES: Final = frozenset({Happened.DENIED, Happened.MISMATCH, Happened.WRONG_KEY, Happened.BROKEN})


class _State(Enum):
    #: Between two tries, or looking up a name.
    WAITING = auto()
    TRYING = auto()
    UP = auto()
    CLOSED = auto()


class Dialer:
    """Connects a socket, again and again.

    Args:
        socket: The DEALER, with all its options set.
        endpoints: Where to connect to; all of them, and all addresses of their names, are tried in turn. Files
            that hold them are read for each round.
        shown: What they are called in errors.
        rng: Chance, so that a thousand peers do not come back in step.
        has_keys: Whether the socket encrypts.
        denied: Told why no try can succeed before somebody changes something; tries go on all the same.
        settled: Whether all messages of the former connection have been read: it is forgotten then.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        endpoints: list[Endpoint],
        shown: str,
        rng: random.Random,
        *,
        has_keys: bool,
        denied: Callable[[FabricError], None],
        settled: Callable[[], bool],
    ) -> None:
        self._socket = socket
        self._endpoints = endpoints
        self._shown = shown
        self._targets = Targets(endpoints, rng)
        self._has_keys = has_keys
        self._denied = denied
        self._settled = settled
        self._loop = asyncio.get_running_loop()
        # Each process draws a first delay and a cap of its own.
        self._first_s = limits.RECONNECT_MIN_MS * rng.uniform(0.5, 1.5) / 1_000
        self._cap_s = limits.RECONNECT_MAX_MS * rng.uniform(0.5, 1.0) / 1_000
        self._delay_s = self._first_s
        self._state = _State.WAITING
        self._addresses: list[Endpoint] = []
        self._current: str | None = None
        self._failure: Happened | None = None
        self._broken = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: Why the last try failed, in words; "" after one that did not.
        self.trouble = ""

    def start(self) -> None:
        """Try for the first time.

        Raises:
            ConfigurationError: The ipc socket's directory is somebody else's.
        """
        for endpoint in self._endpoints:
            if endpoint.is_ipc:
                check_ipc_owner(Path(endpoint.path))
        self._begin_round()

    def close(self) -> None:
        """No more tries."""
        self._state = _State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    @property
    def several(self) -> bool:
        """Whether there is more than one controller to go to, as far as is known."""
        return self._targets.several

    def leave(self) -> bool:
        """Leave this controller for the next one. Returns whether there was a connection."""
        if self._state is not _State.UP:
            return False
        self.trouble = "the connection was left"
        self._later()
        return True

    def handle(self, happened: Happened) -> Happened | None:
        """Take news of the monitor. Returns UP or DOWN if this is what it means for the link."""
        if self._state is _State.UP and happened is Happened.DOWN:
            self._state = _State.WAITING
            self.trouble = "the connection was lost"
            self._later()
            return Happened.DOWN
        if self._state is not _State.TRYING:
            # Late news of a connection that was given up.
            return None
        if happened is Happened.UP:
            self._state = _State.UP
            self._delay_s = self._first_s
            self._addresses = []
            self._broken = 0
            self.trouble = ""
            return Happened.UP
        if happened in _HANDSHAKE_FAILURES:
            self._failure = happened
        else:
            self._failed(reachable=self._failure is not None or happened is Happened.DOWN)
        return None

    # ── tries ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _later(self) -> None:
        self._state = _State.WAITING
        self._timer = self._loop.call_later(self._delay_s, self._again)
        self._delay_s = min(self._delay_s * 2, self._cap_s)

    def _again(self) -> None:
        if self._state is not _State.WAITING:
            return
        if not self._settled():
            self._timer = self._loop.call_later(0, self._again)
            return
        if self._current is not None:
            # The session may have ended by itself, and is then unknown.
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(self._current)
            self._current = None
        if self._addresses:
            self._connect(self._addresses.pop(0))
        else:
            self._begin_round()

    def _begin_round(self) -> None:
        """Try each address once."""
        if len(self._endpoints) == 1 and self._endpoints[0].literal:
            self._connect(self._endpoints[0])
        else:
            self._spawn(self._resolve())

    async def _resolve(self) -> None:
        self.trouble = ""
        try:
            self._addresses = await self._targets.round()
        except ConfigurationError as error:
            self.trouble = error.message
            self._denied(error)
        except OSError as error:
            self.trouble = unknown(error)
        if self._state is _State.CLOSED:
            return
        if self._addresses:
            self._connect(self._addresses.pop(0))
        else:
            self.trouble = self.trouble or "the name has no address"
            self._later()

    def _connect(self, endpoint: Endpoint) -> None:
        self._targets.trying(endpoint)
        address = endpoint.text
        if endpoint.is_ipc:
            try:
                there = check_ipc_owner(Path(endpoint.path))
            except ConfigurationError as error:
                self.trouble = error.message
                self._later()
                self._denied(error)
                return
            if not there:
                self.trouble = "there is no such socket"
                self._later()
                return
        self._state = _State.TRYING
        self._failure = None
        self._current = address
        # For an IPv4 address libzmq would have to map it, which not every system can.
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._current = None
            self.trouble = f"{address}: {error}"
            self._later()

    def _failed(self, *, reachable: bool) -> None:
        """This try is over. The next address is tried at once if nobody was at this one."""
        if not reachable:
            self.trouble = "nobody listens there"
            self._broken = 0
            if self._addresses:
                self._state = _State.WAITING
                self._timer = self._loop.call_later(0, self._again)
                return
        self._later()
        if reachable:
            self._explain(self._failure or Happened.BROKEN)

    # ── handshakes ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _explain(self, failure: Happened) -> None:
        self.trouble = "what listens there ended the handshake"
        if failure is Happened.DENIED:
            self._deny(UNKNOWN_KEY)
        elif self._current is not None:
            self._spawn(self._find_out(parse_endpoint(self._current)))

    async def _find_out(self, endpoint: Endpoint) -> None:
        """Ask what the other end speaks. That it speaks CURVE as well, and ends handshakes again and again, leaves the key:
        a controller cannot read what is encrypted for another one."""
        own = "CURVE" if self._has_keys else "NULL"
        mechanism = await exchange_mechanisms(endpoint, own)
        if self._state in (_State.UP, _State.CLOSED):
            return
        if mechanism is None:
            self._broken = 0
            self.trouble = "what listens there is no controller, or ends"
        elif mechanism != own:
            self._deny_mismatch()
        elif self._has_keys:
            self._broken += 1
            if self._broken >= limits.HANDSHAKES_MAX:
                self._deny(OTHER_KEY)

    def _deny_mismatch(self) -> None:
        self._deny(NO_KEYS_THERE if self._has_keys else NO_KEYS_HERE)

    def _deny(self, refusal: Refusal) -> None:
        self.trouble = f"the controller {refusal[1]}"
        self._denied(refused(refusal, self._shown))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
