"""The controller's loop: burst in → core → sends out → re-arm one timer."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from zfabric import limits
from zfabric.controller.config import ControllerConfig
from zfabric.controller.keyring import KeyRing
from zfabric.core.broker import Broker
from zfabric.errors import ConfigurationError
from zfabric.ids import RoutingId
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.curve import ControllerKeys, load_secret
from zfabric.transport.loop_timer import LoopTimer
from zfabric.transport.router import RouterLink
from zfabric.version import __version__
from zfabric.wire.kinds import NAMES

#: A look for messages whose edge was missed; it has nothing to do, and counts if it had.
_WATCHDOG_S: Final = 0.25
_RECHECK_S: Final = 0.01

#: log(event, **fields), as structlog's loggers take it.
Log = Callable[..., Any]


def _silent(event: str, **fields: object) -> None:
    """The log of a program that wants none."""


class Controller:
    """A broker on a ROUTER socket. Use as an async context manager.

    Args:
        config: See `ControllerConfig`.
        log: Called with an event's name and fields for peers that come and go; never per request.

    Raises:
        EndpointInUseError, ConfigurationError: On entering, if an endpoint cannot be had.
    """

    def __init__(self, config: ControllerConfig | None = None, *, log: Log | None = None) -> None:
        self.config = config or ControllerConfig()
        self.rescued = 0
        self._log = log or _silent
        self._link: RouterLink | None = None
        self._broker: Broker | None = None
        self._idle: asyncio.Event = asyncio.Event()
        self._scheduled = False
        self._pumps = 0
        self._seen = -1

    @property
    def broker(self) -> Broker:
        """The core. Raises: ConfigurationError before the controller was entered."""
        if self._broker is None:
            raise ConfigurationError("the controller does not run")
        return self._broker

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens, with wildcards resolved."""
        return self._link.endpoints if self._link is not None else self.config.endpoints

    async def __aenter__(self) -> Controller:
        self._loop = asyncio.get_running_loop()
        rng = random.Random(secrets.randbits(64))
        self._broker = Broker(
            self.config.broker, rng, monotonic_ns(), __version__, make_token=lambda: secrets.token_bytes(16)
        )
        self._link = link = self._open_link(self._broker)
        link.is_known = self._broker.has_session
        self._broker.transport_figures = self._figures
        self._broker.on_bug = self._bug
        self._broker.desk.chooser.on_failure = lambda what, times: self._log("policy_failed", what=what, times=times)
        self._timer = LoopTimer(self._loop, self._tick)
        self._probe_timer = LoopTimer(self._loop, self._check_connections)
        self._retry_timer = LoopTimer(self._loop, self._retry_parked)
        self._fds = (link.fd, link.monitor_fd)
        self._loop.add_reader(self._fds[0], self._pump)
        self._loop.add_reader(self._fds[1], self._connections_changed)
        self._watchdog = self._loop.call_later(_WATCHDOG_S, self._rescue)
        if link.file_limit is not None and link.file_limit < limits.FILE_DESCRIPTORS_MIN:
            self._log("file_limit_low", limit=link.file_limit, wanted=limits.FILE_DESCRIPTORS_MIN)
        self._log("listening", endpoints=list(link.endpoints), policy=self.config.broker.policy, files=link.file_limit)
        self._pump()
        return self

    def _open_link(self, broker: Broker) -> RouterLink:
        """The socket; with keys configured it knows who each peer is, and tells the broker."""
        if self.config.key is None or self.config.keyring is None:
            return RouterLink(self.config.endpoints)
        ring = KeyRing.load(self.config.keyring)
        link = RouterLink(self.config.endpoints, ControllerKeys(load_secret(self.config.key), ring.allows))
        broker.grant_of = lambda peer: ring.grant(link.key_of(peer))
        self._log("keys", known=len(ring), file=str(self.config.keyring))
        return link

    async def __aexit__(self, *_: object) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        self.broker.goodbye()
        for send in self.broker.outbox.take():
            link.send(*send)
        # Farewells leave libzmq's pipes within this time, or not at all: sockets do not linger.
        await asyncio.sleep(0.02)
        for fd in self._fds:
            self._loop.remove_reader(fd)
        for timer in (self._timer, self._probe_timer, self._retry_timer):
            timer.cancel()
        self._watchdog.cancel()
        link.close()

    async def drain(self, limit_ms: int | None = None) -> bool:
        """Take no new requests and wait for the running ones.

        Args:
            limit_ms: How long at most, None for the configured time.

        Returns:
            Whether all had ended. What still runs goes on at its worker, and the next controller takes it over.
        """
        self.broker.drain(monotonic_ns())
        limit_s = (self.config.drain_ms if limit_ms is None else limit_ms) / 1_000
        self._log("draining", in_flight=self.broker.in_flight, limit_s=limit_s)
        try:
            async with asyncio.timeout(limit_s):
                while not self.broker.drained(monotonic_ns()):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pump(self) -> None:
        """The link passes chunks on by itself, through the narrow door; everything else comes in by the wide one."""
        self._scheduled = False
        link, broker = self._link, self._broker
        if link is None or broker is None:
            return
        self._pumps += 1
        now_ns = monotonic_ns()
        self._read(link, broker, now_ns)
        self._after(link, broker, now_ns)

    def _read(self, link: RouterLink, broker: Broker, now_ns: int) -> None:
        """Take one burst of what has arrived."""
        # The first message is taken alone, since there is rarely a second: to ask for more costs less than a vain read.
        for count_max in (1, limits.BURST_MESSAGES_MAX):
            link.relay(broker.routes.table, self, now_ns, count_max)
            if not link.readable():
                break

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        """Anything but a chunk with a reader."""
        link, broker = self._link, self._broker
        assert link is not None
        assert broker is not None
        now_ns = monotonic_ns()
        broker.receive(sender, header, body, now_ns)
        if broker.outbox.pending:
            self._perform(link, broker, now_ns)

    def link_malformed(self, sender: RoutingId, header: bytes) -> None:
        """A message of a wrong number of frames."""
        link, broker = self._link, self._broker
        assert link is not None
        assert broker is not None
        now_ns = monotonic_ns()
        broker.malformed(sender, header, now_ns)
        self._perform(link, broker, now_ns)

    def _bug(self, error: Exception, kind: int) -> None:
        """This program is at fault, and goes on."""
        self._log("internal_error", error=f"{type(error).__name__}: {error}", kind=NAMES.get(kind, kind))

    def link_lost(self, peer: RoutingId) -> None:
        """A reader turned out to be gone."""
        link, broker = self._link, self._broker
        assert link is not None
        assert broker is not None
        self._gone(link, broker, peer, monotonic_ns())

    def _after(self, link: RouterLink, broker: Broker, now_ns: int) -> None:
        """Send what is due, re-arm the timers, and make sure that no message waits unseen."""
        self._perform(link, broker, now_ns)
        self._timer.arm(broker.next_deadline_ns(), now_ns)
        self._retry_timer.arm(link.next_retry_ns(), now_ns)
        if broker.desk.draining and not self._idle.is_set() and broker.drained(now_ns):
            self._idle.set()
        if not self._scheduled and link.readable():
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _perform(self, link: RouterLink, broker: Broker, now_ns: int) -> None:
        """Perform the core's sends in order; a peer that turns out to be gone leads to more of them."""
        while broker.outbox.pending:
            for to, header, body in broker.outbox.take():
                if not link.send(to, header, body):
                    self._gone(link, broker, to, now_ns)

    def _gone(self, link: RouterLink, broker: Broker, peer: RoutingId, now_ns: int) -> None:
        link.forget(peer)
        broker.disconnected(peer, now_ns)

    def _tick(self) -> None:
        link, broker = self._link, self._broker
        if link is not None and broker is not None:
            now_ns = monotonic_ns()
            # What has arrived goes first: an answer that waits in the socket was in time for its deadline.
            self._read(link, broker, now_ns)
            broker.tick(now_ns)
            self._after(link, broker, now_ns)

    def _connections_changed(self) -> None:
        """Connections came or went. Who is gone may have said something before, and be it goodbye: that is read first."""
        link, broker = self._link, self._broker
        if link is not None and broker is not None:
            self._read(link, broker, monotonic_ns())
            self._check_connections()

    def _check_connections(self) -> None:
        """Take the news of connections, and probe those that are suspected to be gone."""
        link, broker = self._link, self._broker
        if link is None or broker is None:
            return
        now_ns = monotonic_ns()
        for peer in link.lost_connections(now_ns):
            self._gone(link, broker, peer, now_ns)
        for reason, count in link.failed_handshakes(now_ns):
            self._log("handshake_failed", reason=reason, count=count)
        self._probe_timer.arm(link.next_probe_ns(), now_ns)
        self._after(link, broker, now_ns)

    def _retry_parked(self) -> None:
        link, broker = self._link, self._broker
        if link is None or broker is None:
            return
        now_ns = monotonic_ns()
        for peer in link.retry_parked(now_ns):
            self._gone(link, broker, peer, now_ns)
        self._after(link, broker, now_ns)

    def _rescue(self) -> None:
        if self._link is None:
            return
        waiting = self._link.readable()
        if waiting and self._seen == self._pumps:
            self.rescued += 1
            self._pump()
        # Something that waits now is only late if the pump has not run by the next look, which then is a short one.
        self._seen = self._pumps if waiting else -1
        self._check_connections()
        self._watchdog = self._loop.call_later(_RECHECK_S if waiting else _WATCHDOG_S, self._rescue)

    def _figures(self) -> dict[str, int]:
        figures = asdict(self._link.figures) if self._link is not None else {}
        return {**figures, "rescued": self.rescued}
