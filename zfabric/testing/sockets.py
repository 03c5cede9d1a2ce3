"""What a process of the library has in place of its socket, its clock and its chance while it is simulated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from zfabric.core.controller.access import EVERYBODY
from zfabric.errors import WorkerDrainingError
from zfabric.testing.loop import SimLoop
from zfabric.testing.network import Link, Network
from zfabric.testing.world import World
from zfabric.transport.links import DealerReceiver
from zfabric.wire import codec, kinds


class SimSecrets:
    """`secrets`, with the run's own chance."""

    def __init__(self, rng: random.Random) -> None:
        self.randbits = rng.getrandbits
        self.token_bytes = rng.randbytes
        self.SystemRandom = lambda: random.Random(rng.getrandbits(64))


class Process(Protocol):
    """Who owns a loop."""

    networks: list[Network]

    def connected(self, dealer: SimDealer) -> None: ...


class ProcessLoop(SimLoop):
    """The loop of a process, by which its sockets find their network."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__(world)
        self.process = process


class SimDealer:
    """A `links.DealerDriver` over the simulated network. It finds its network by the loop that runs."""

    honest: Final = True
    grant: Final = EVERYBODY

    def __init__(
        self,
        endpoint: str,
        receiver: DealerReceiver,
        rng: random.Random,
        credentials: object = None,
        transport: str | None = None,
        spin_us: int | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ProcessLoop)
        self.endpoint = endpoint
        self._connections = 0
        #: Why there is no connection.
        self.trouble = ""
        self.link: Link | None = None
        self.closed = False
        #: Requests that were ended unanswered with the farewell.
        self.handed_back = 0
        #: Told of the first frame of what was sent.
        self.on_sent: Callable[[bytes], None] = lambda _: None
        self._loop = loop
        self._receiver = receiver
        mine = [network for network in loop.process.networks if network.endpoint in endpoint.split(",")]
        #: Whether it goes to another controller when it has lost one.
        self.roams = len(mine) > 1
        self._network = mine[0] if len(mine) == 1 else mine[0].world.rng.choice(mine)
        self._inbox: list[tuple[str, Link | None, bytes, bytes]] = []
        self._scheduled = False
        loop.process.connected(self)
        self._network.connect(self)

    @property
    def connected(self) -> bool:
        return self.link is not None

    @property
    def congested(self) -> bool:
        return False

    @property
    def several(self) -> bool:
        return self.roams

    def move_on(self) -> None:
        """Leave this controller for the next one."""
        if self.link is not None:
            self.link.network.cut(self.link)

    def counted(self) -> dict[str, int]:
        """As a real one counts."""
        return {"malformed": 0, "rescued": 0, "connections": self._connections}

    def send_all(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        """Send in order; without a connection nothing leaves."""
        link = self.link
        if link is None or not link.alive:
            return
        handed_back = 0
        for header, body in messages:
            link.to_hub(header, body)
            self.on_sent(header)
            if header[0] == kinds.ENDS:
                ends = codec.unpack_envelope(header).ends
                handed_back += sum(end.code == WorkerDrainingError.code for end in ends)
            elif header[0] == kinds.GOODBYE:
                self.handed_back = handed_back

    def close(self) -> None:
        """The connection ends when what was sent has left."""
        if not self.closed:
            self.closed = True
            link, self.link = self.link, None
            if link is not None:
                link.network.world.after(50, lambda: link.network.cut(link, peer_alive=False))

    def kill(self) -> None:
        """The process is gone, and its kernel ends the connection."""
        self.closed = True
        link, self.link = self.link, None
        if link is not None:
            link.network.cut(link, peer_alive=False)

    # ── from the network ────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self, link: Link) -> None:
        if self.closed:
            link.network.cut(link, peer_alive=False)
        else:
            self._came("up", link)

    def link_down(self, link: Link) -> None:
        if not self.closed:
            if self._network.world.rng.random() < 0.5:
                # The news may come before the last messages do.
                self._inbox.insert(0, ("down", link, b"", b""))
                self._came("", None)
            else:
                self._came("down", link)

    def link_message(self, header: bytes, body: bytes) -> None:
        if not self.closed:
            self._came("message", None, header, body)

    def _came(self, what: str, link: Link | None, header: bytes = b"", body: bytes = b"") -> None:
        self._inbox.append((what, link, header, body))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        inbox, self._inbox = self._inbox, []
        for what, link, header, body in inbox:
            if self.closed:
                return
            if what == "message":
                self._receiver.link_message(header, body)
            elif what == "up":
                assert link is not None
                if link.alive:
                    self.link = link
                    self._connections += 1
                    self._receiver.link_up()
            elif what == "down" and self.link is link:
                self.link = None
                self._receiver.link_down()
        if not self.closed:
            self._receiver.link_idle()
