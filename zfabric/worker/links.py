"""A worker's links: one to each of its controllers, which endpoints name, or names with several addresses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from zfabric import limits
from zfabric.core.worker.session import Order, Refused, WorkerSession
from zfabric.core.worker.sessions import WorkerSessions
from zfabric.errors import FabricError
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.endpoints import Endpoint, parse_endpoints
from zfabric.transport.links import DealerDriver, Log, open_dealer
from zfabric.transport.targets import controllers_of
from zfabric.worker.config import WorkerConfig

#: What a link counts of itself; where there are several, the sum is told.
Counted = dict[str, int]


class ControllerLink:
    """One link, and the session that goes over it; see `links.DealerReceiver`."""

    def __init__(self, links: ControllerLinks, session: WorkerSession, endpoint: str) -> None:
        self.endpoint = endpoint
        self.session = session
        self.driver: DealerDriver | None = None
        self._links = links

    def link_up(self) -> None:
        self._links.log("connected", endpoint=self.endpoint)
        self.session.connected(monotonic_ns())

    def link_down(self) -> None:
        self._links.log("disconnected", endpoint=self.endpoint, running=len(self.session.streams))
        self.session.disconnected()

    def link_denied(self, error: FabricError) -> None:
        self._links.denied(error)

    def link_message(self, header: bytes, body: bytes) -> None:
        try:
            orders = self.session.receive(header, body, monotonic_ns())
        except FabricError as error:
            self._links.log("bad_message", error=str(error))
        else:
            if orders:
                self._links.obey(self, orders)

    def link_idle(self) -> None:
        self._links.settle()

    def send(self) -> None:
        """Send what there is."""
        if self.driver is not None and self.session.outbox:
            taken, self.session.outbox = self.session.outbox, []
            self.driver.send_all(taken)


class ControllerLinks:
    """All of them.

    Args:
        config: Whom to dial, and how.
        sessions: What is said.
        rng: Chance, for the jitter of reconnects.
        log: Called with an event's name and fields.
        obey: Does what a message led to.
        denied: Told why a controller lets no connection of this worker in.
        settled: Called when what had come has been handled and what it led to has been sent.

    Attributes:
        open: Whether they are to be there.
    """

    def __init__(
        self,
        config: WorkerConfig,
        sessions: WorkerSessions,
        rng: random.Random,
        log: Log,
        obey: Callable[[Sequence[Order]], None],
        denied: Callable[[FabricError], None],
        settled: Callable[[], None],
    ) -> None:
        self.open = False
        self.log = log
        self.denied = denied
        self._config = config
        self._sessions = sessions
        self._rng = rng
        self._obey = obey
        self._settled = settled
        self._all: dict[str, ControllerLink] = {}
        #: Endpoints that lead to a controller that another link is connected to.
        self._twins: dict[str, WorkerSession] = {}
        #: By name, what it was found to stand for.
        self._known: dict[str, list[str]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Dial, on the running loop. Raises: ConfigurationError: An endpoint or a key cannot be used."""
        self.open = True
        endpoints = parse_endpoints(self._config.endpoint)
        named = [endpoint for endpoint in endpoints if endpoint.named]
        for endpoint in endpoints:
            if not endpoint.named:
                self._dial(endpoint.text)
        if named or len(endpoints) > 1:
            self._task = asyncio.get_running_loop().create_task(self._look_up(named))

    def close(self) -> None:
        """Close all. What the kernel takes within a moment still leaves."""
        self.open = False
        if self._task is not None:
            self._task.cancel()
        for link in self._all.values():
            if link.driver is not None:
                link.driver.close()
        self._all.clear()

    def counted(self) -> Counted:
        """What they counted, together."""
        total: Counted = {}
        for link in self._all.values():
            for name, count in (link.driver.counted() if link.driver is not None else {}).items():
                # In a dealer it is how often it connected.
                told = "connected" if name == "connections" else name
                total[told] = total.get(told, 0) + count
        return total

    def send(self) -> None:
        """Send what there is to say, to each."""
        for link in self._all.values():
            link.send()

    def settle(self) -> None:
        """What had come has been handled."""
        if self.open:
            self._sessions.settle(monotonic_ns())
            self.send()
            self._settled()

    def obey(self, link: ControllerLink, orders: Sequence[Order]) -> None:
        """Do what a message led to."""
        if len(self._all) > 1 and (twin := self._twin_of(orders)) is not None:
            self._twins[link.endpoint] = twin
            self._drop(link)
            return
        self._obey(orders)

    def _twin_of(self, orders: Sequence[Order]) -> WorkerSession | None:
        """Another session with a controller that says that this worker is there already: its other endpoints are not needed."""
        epochs = [order.error.details.get("epoch") for order in orders if isinstance(order, Refused)]
        return next((other for other in self._sessions if other.registered and other.epoch in epochs), None)

    # ── who is dialed ───────────────────────────────────────────────────────────────────────────────────────────────

    def _dial(self, endpoint: str) -> None:
        link = ControllerLink(self, self._sessions.open(), endpoint)
        config = self._config
        self._all[endpoint] = link
        link.driver = open_dealer(endpoint, link, self._rng, config.credentials, config.transport, config.spin_us)

    def _drop(self, link: ControllerLink) -> None:
        self._all.pop(link.endpoint, None)
        if link.driver is not None:
            link.driver.close()
            link.driver = None
        self._sessions.close(link.session)

    async def _look_up(self, named: list[Endpoint]) -> None:
        """Have a link to each address that the names have, and to each controller once, now and later."""
        wait_s, told = limits.RECONNECT_MIN_MS / 1_000, False
        while True:
            found: set[str] = set()
            trouble = ""
            for endpoint in named:
                try:
                    known = self._known[endpoint.text] = await controllers_of(endpoint)
                    found.update(known)
                except OSError as error:
                    trouble = f"{endpoint.host!r} cannot be looked up: {error}"
                    # Who was there is there.
                    found.update(self._known.get(endpoint.text, ()))
            if trouble and not told:
                self.log("name_unknown", error=trouble)
            told = bool(trouble)
            self._follow(found)
            wait_s = min(wait_s * 2, limits.RECONNECT_MAX_MS / 1_000) if trouble else limits.RESOLVE_MS / 1_000
            await asyncio.sleep(wait_s * self._rng.uniform(0.75, 1.25))

    def _follow(self, found: set[str]) -> None:
        fixed = {endpoint.text for endpoint in parse_endpoints(self._config.endpoint) if not endpoint.named}
        for endpoint, link in list(self._all.items()):
            gone = endpoint not in found and endpoint not in fixed
            if gone and (link.driver is None or not link.driver.connected):
                self.log("controller_gone", endpoint=endpoint)
                self._drop(link)
        for endpoint, twin in list(self._twins.items()):
            if not twin.registered or endpoint not in found | fixed:
                del self._twins[endpoint]
        for endpoint in sorted((found | fixed) - self._all.keys() - self._twins.keys()):
            try:
                self._dial(endpoint)
            except FabricError as error:
                # The others are looked for all the same, and this one again.
                self.log("refused", error=str(error), code=error.code)
                self._drop(self._all[endpoint])
