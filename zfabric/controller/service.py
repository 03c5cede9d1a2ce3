"""The controller's loop: burst in → core → sends out → re-arm one timer."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable

from zfabric import limits
from zfabric.controller.cell import CellLink
from zfabric.controller.config import ControllerConfig
from zfabric.controller.live_keys import LiveKeys
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.scaling import Rule
from zfabric.core.controller.snapshot import state_of
from zfabric.core.controller.spans import AttemptSpan
from zfabric.core.outlets import Outlets
from zfabric.core.recorder import FIELDS
from zfabric.errors import ConfigurationError
from zfabric.ids import RoutingId
from zfabric.recording.ring import Ring
from zfabric.transport.clock import monotonic_ns, unix_ns
from zfabric.transport.curve import ControllerKeys, load_secret
from zfabric.transport.links import Log, RouterDriver, Routes, open_router, silent
from zfabric.transport.loop_timer import LoopTimer
from zfabric.version import __version__
from zfabric.wire.kinds import NAMES


class Controller:
    """A broker on a ROUTER socket. Use as an async context manager.

    Args:
        config: See `ControllerConfig`.
        log: Called with an event's name and fields for peers that come and go; never per request.
        traces: Called with spans of attempts that have ended, of requests whose clients have them traced; times are those of
            `time.monotonic_ns`. None passes what clients say of their traces on to workers, and makes no spans.

    Raises:
        EndpointInUseError, ConfigurationError: On entering, if an endpoint cannot be had.
    """

    def __init__(
        self,
        config: ControllerConfig | None = None,
        *,
        log: Log | None = None,
        traces: Callable[[list[AttemptSpan]], None] | None = None,
    ) -> None:
        self.config = config or ControllerConfig()
        self._log = log or silent
        self._traces = traces
        self._outlets = Outlets(lambda error: self._bug(error, 0))
        self._link: RouterDriver | None = None
        self._broker: Broker | None = None
        self._ring: Ring | None = None
        self._keys: LiveKeys | None = None
        self._cell: CellLink | None = None
        self._idle: asyncio.Event = asyncio.Event()

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
        self._broker = broker = Broker(
            self.config.broker,
            rng,
            monotonic_ns(),
            __version__,
            make_token=lambda: secrets.token_bytes(16),
            recorded=self.config.record is not None,
        )
        self._outlets = Outlets(lambda error: self._bug(error, 0))
        if self._traces is not None:
            self._outlets.add(broker.trace(), self._traces)
        if self.config.record is not None and broker.recorder is not None:
            self._ring = Ring(
                self.config.record,
                of="controller",
                build=__version__,
                fields=FIELDS,
                clock=monotonic_ns,
                wall_clock=unix_ns,
                state=lambda now_ns: state_of(broker, now_ns),
                on_failure=lambda error: self._log("recording_failed", error=str(error)),
            )
            self._outlets.add(broker.recorder, self._ring.write)
        self._broker.transport_figures = self._figures
        self._broker.wall_clock_s = lambda: unix_ns() / 1e9
        self._broker.on_bug = self._bug
        self._broker.scheduler.chooser.on_failure = lambda what, times: self._log(
            "policy_failed", what=what, times=times
        )
        self._timer = LoopTimer(self._loop, self._tick)
        self._link = link = self._open_link(self._broker)
        link.is_known = self._broker.has_session
        self._broker.buffered_of = link.buffered
        if link.file_limit is not None and link.file_limit < limits.FILE_DESCRIPTORS_MIN:
            self._log("file_limit_low", limit=link.file_limit, wanted=limits.FILE_DESCRIPTORS_MIN)
        self._log("listening", endpoints=list(link.endpoints), policy=self.config.broker.policy, files=link.file_limit)
        if self.config.cell is not None:
            self._cell = CellLink(
                self.config.cell, broker, self._log, self.link_idle, self.config.transport, self.config.spin_us
            )
        self.link_idle()
        return self

    def _open_link(self, broker: Broker) -> RouterDriver:
        """The socket; with keys configured it knows who each peer is, and tells the broker."""
        config, routes = self.config, broker.routes.table
        if config.key is None or config.keyring is None:
            return self._open_router(routes, None)
        keys = LiveKeys(config.keyring, self._log, self._review_keys)
        link = self._open_router(routes, ControllerKeys(load_secret(config.key), keys.allows))
        broker.grant_of = lambda peer: keys.grant(link.key_of(peer))
        keys.start(self._loop)
        self._keys = keys
        return link

    def reload_keys(self) -> None:
        """Read the keyring now, changed or not. One that cannot be used is told of in the log, and the former stays in force."""
        if self._keys is not None:
            self._keys.read()

    def set_rules(self, rules: list[Rule]) -> None:
        """Decide by these rules how many replicas models should have. Raises: ConfigurationError: Two are about one model."""
        broker = self.broker
        broker.scale(rules, monotonic_ns())
        self.link_idle()

    def _review_keys(self) -> None:
        """Keys may do something else: who may not be here any more is told so, and cut off."""
        link, broker, keys = self._link, self._broker, self._keys
        if link is None or broker is None or keys is None:
            return
        gone = set(broker.review_keys(monotonic_ns()))
        gone |= {peer for peer, key in link.keyed().items() if not keys.allows(key)}
        self.link_idle()
        for peer in gone:
            link.cut(peer)

    def _open_router(self, routes: Routes, keys: ControllerKeys | None) -> RouterDriver:
        config = self.config
        return open_router(
            config.endpoints,
            routes,
            self,
            keys=keys,
            transport=config.transport,
            spin_us=config.spin_us,
            other_users=config.other_users,
            log=self._log,
        )

    async def __aexit__(self, *_: object) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        if self._keys is not None:
            self._keys.stop()
        if self._cell is not None:
            self._cell.close()
            self._cell = None
        self.broker.goodbye()
        for send in self.broker.outbox.take():
            link.send(*send)
        self._timer.cancel()
        await link.close()
        self._outlets.pass_on()
        if self._ring is not None:
            self._ring.close()

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

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        """Anything but a chunk with a reader."""
        link, broker = self._link, self._broker
        assert link is not None
        assert broker is not None
        if self._cell is not None and self._cell.relay(sender, header):
            return
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
        self._log(
            "internal_error", error=f"{type(error).__name__}: {error}", kind=NAMES.get(kind, kind), exc_info=error
        )

    def link_lost(self, peer: RoutingId) -> None:
        """A connection is gone."""
        link, broker = self._link, self._broker
        if link is not None and broker is not None:
            self._gone(link, broker, peer, monotonic_ns())

    def link_idle(self) -> None:
        """What had come has been handled: send what is due, and re-arm the timer."""
        link, broker = self._link, self._broker
        if link is None or broker is None:
            return
        now_ns = monotonic_ns()
        self._perform(link, broker, now_ns)
        if self._cell is not None:
            self._cell.settle(now_ns)
        self._timer.arm(broker.next_deadline_ns(), now_ns)
        if broker.journal.pending:
            self._tell(broker)
        self._outlets.pass_on()
        if broker.scheduler.draining and not self._idle.is_set() and broker.drained(now_ns):
            self._idle.set()

    def _perform(self, link: RouterDriver, broker: Broker, now_ns: int) -> None:
        """Perform the core's sends in order; a peer that turns out to be gone leads to more of them."""
        while broker.outbox.pending:
            sends = broker.outbox.take()
            for to, header, body in sends if self._cell is None else self._cell.sift(sends):
                if not link.send(to, header, body):
                    self._gone(link, broker, to, now_ns)

    def _tell(self, broker: Broker) -> None:
        """Pass on what happened to whoever reads it."""
        dropped = broker.journal.dropped
        for entry in broker.journal.take():
            self._log(entry.event, **entry.fields)
        if dropped:
            self._log("events_dropped", count=dropped)

    def _gone(self, link: RouterDriver, broker: Broker, peer: RoutingId, now_ns: int) -> None:
        link.forget(peer)
        broker.disconnected(peer, now_ns)

    def _tick(self) -> None:
        if self._link is not None:
            # What has arrived goes first: an answer that waits in the socket was in time for its deadline.
            self._link.take_waiting(self._do_what_is_due)

    def _do_what_is_due(self) -> None:
        self.broker.tick(monotonic_ns())

    @property
    def rescued(self) -> int:
        """Messages that were found late, because libzmq had not told of them."""
        return self._figures().get("rescued", 0)

    def _figures(self) -> dict[str, int]:
        return self._link.counted() if self._link is not None else {}
