"""The two links that the fabric runs over, whatever moves their bytes, and what opens one.

Two drivers serve each: `libzmq` (pyzmq's sockets), and `loop` (ZMTP spoken on the event loop's own transports). They are the
same on the wire, so any side may have either. A driver is imported when it is asked for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final, Literal, Protocol, get_args

from zfabric import limits
from zfabric.errors import ConfigurationError, FabricError
from zfabric.ids import RoutingId
from zfabric.transport.curve import ControllerKeys, Credentials
from zfabric.wire.codec import EMPTY

Transport = Literal["loop", "libzmq"]
TRANSPORTS: Final[tuple[Transport, ...]] = get_args(Transport)
DEFAULT_TRANSPORT: Final[Transport] = "loop"
#: Chooses the driver where nothing else does.
TRANSPORT_VARIABLE: Final = "ZFABRIC_TRANSPORT"
#: For how many microseconds links look for more after work, where nothing else says so.
SPIN_VARIABLE: Final = "ZFABRIC_SPIN_US"

#: log(event, **fields), as structlog's loggers take it.
Log = Callable[..., Any]


def silent(event: str, **fields: object) -> None:
    """The log of a program that wants none."""


class Heard(Protocol):
    """A peer whose lease its messages renew."""

    heard_ns: int


class Route(Protocol):
    """Where chunks go, and who sends them."""

    @property
    def client(self) -> RoutingId: ...
    @property
    def worker(self) -> Heard: ...


#: By sender and the first five bytes of a message, where chunks go.
Routes = Mapping[bytes, Route]


class RelayReceiver(Protocol):
    """Who takes what is not passed on."""

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        """Anything but a chunk with a route. A large body may be a buffer of the driver's, to be passed on as it is."""

    def link_malformed(self, sender: RoutingId, header: bytes) -> None:
        """A message has more or fewer frames than its kind; only the first one is handed over."""

    def link_lost(self, peer: RoutingId) -> None:
        """A peer's connection is gone."""


class RouterReceiver(RelayReceiver, Protocol):
    """Who drives a controller's link. All calls come from the loop; none may raise."""

    def link_idle(self) -> None:
        """What had come has been handled: time to send what it led to. The link's sends leave when this returns."""


class RouterDriver(Protocol):
    """A controller's link: any number of listeners, and a name for each connection. It passes chunks on by itself.

    It works from when it is opened, on the running loop.
    """

    #: Whether a message of too many frames ends its connection before all of them were kept.
    bounds_messages: ClassVar[bool]
    #: Where it listens, with wildcards resolved.
    endpoints: tuple[str, ...]
    #: Files that this process may have open, a connection each; None where that is not known.
    file_limit: int | None
    #: Whether a peer has a session. One that has none may have less kept for it.
    is_known: Callable[[RoutingId], bool]

    def send(self, to: RoutingId, header: bytes, body: bytes = EMPTY) -> bool:
        """Send in order, or keep what the peer is too slow for. False if the peer is gone, or too much is kept for it:
        then its connection is as good as lost, and `link_lost` is not called for it."""

    def take_waiting(self, then: Callable[[], None]) -> None:
        """Hand over what has arrived by now, then call back: what waits unread was in time for a deadline."""

    def forget(self, peer: RoutingId) -> None:
        """Drop what is kept and known of a peer that is gone."""

    def key_of(self, peer: RoutingId) -> bytes:
        """The public key (Z85) that a peer has proved; empty without encryption."""

    def keyed(self) -> Mapping[RoutingId, bytes]:
        """All peers whose keys are known, and their keys."""

    def cut(self, peer: RoutingId) -> None:
        """Close a peer's connection. What was sent before still leaves if the peer reads it; half a second later it is cut
        off all the same. `link_lost` is called for it."""

    def buffered(self, peer: RoutingId) -> int:
        """Bytes that wait for a peer which is slow to read; 0 for one that is gone."""

    def counted(self) -> dict[str, int]:
        """What the link counted, and how much is kept now: `buffered_bytes` of all peers."""

    async def close(self) -> None:
        """Let what was sent leave for a moment, then close all connections and listeners. No call comes afterwards.
        Safe to call twice."""


class DealerReceiver(Protocol):
    """Who drives a client's or worker's link. All calls come from the loop; none may raise."""

    def link_up(self) -> None:
        """The controller is connected."""

    def link_down(self) -> None:
        """The connection is gone; the link tries again by itself, for ever."""

    def link_denied(self, error: FabricError) -> None:
        """No connection can be made before somebody changes something: keys that do not match, or an ipc directory
        or listener of somebody else. The link goes on trying, and tells of each try that failed so."""

    def link_message(self, header: bytes, body: bytes) -> None:
        """A message came. One that lacks its body, or has more frames than its kind, has an empty body: it does not decode,
        and what it was about can be ended."""

    def link_idle(self) -> None:
        """All messages that were there have been handled: time to send what they led to."""


class DealerDriver(Protocol):
    """A client's or worker's link to one controller: it connects when it is opened, and again for ever."""

    @property
    def connected(self) -> bool:
        """Whether the controller is there, as far as is known."""

    @property
    def trouble(self) -> str:
        """Why the last try to connect failed, in words; "" if it did not."""

    @property
    def congested(self) -> bool:
        """Whether the controller reads more slowly than is sent."""

    @property
    def several(self) -> bool:
        """Whether there is more than one controller to go to, as far as is known."""

    def move_on(self) -> None:
        """Leave this controller for the next one."""

    def send_all(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        """Send in order; without a connection they are dropped, since sessions say all again."""

    def counted(self) -> dict[str, int]:
        """What the link counted."""

    def close(self) -> None:
        """Close. What has not been sent a moment later is lost: say goodbye first. Safe to call twice."""


def choose(transport: str | None) -> Transport:
    """The driver that is asked for, else $ZFABRIC_TRANSPORT, else the default.

    Raises:
        ConfigurationError: There is none of that name.
    """
    chosen = transport or os.environ.get(TRANSPORT_VARIABLE) or DEFAULT_TRANSPORT
    if chosen not in TRANSPORTS:
        raise ConfigurationError(f"transport {chosen!r} is not one of {', '.join(TRANSPORTS)}", transport=chosen)
    return chosen


def choose_spin(spin_us: int | None, transport: str | None) -> int:
    """For how many microseconds after work the link's loop looks for more before it sleeps: what is asked for, else
    $ZFABRIC_SPIN_US, else 0, which is not at all.

    Args:
        spin_us: 0 … `limits.SPIN_US_MAX`.
        transport: As of `choose`; libzmq has a thread of its own, which sleeps when it wants to.

    Raises:
        ConfigurationError: It is no such number, or the driver cannot do it.
    """
    given: object = os.environ.get(SPIN_VARIABLE) or 0 if spin_us is None else spin_us
    name = "spin_us" if spin_us is not None else SPIN_VARIABLE
    try:
        found = int(given) if isinstance(given, (int, str)) and not isinstance(given, bool) else -1
    except ValueError:
        found = -1
    if not 0 <= found <= limits.SPIN_US_MAX:
        raise ConfigurationError(
            f"{name} is {given!r}, it must be a whole number of microseconds, 0 … {limits.SPIN_US_MAX}",
            spin_us=str(given),
        )
    if found and choose(transport) != "loop":
        raise ConfigurationError(
            f"{name} is {found}, and transport {choose(transport)} cannot do that; use transport loop, or 0",
            spin_us=found,
        )
    return found


def open_router(
    endpoints: tuple[str, ...],
    routes: Routes,
    receiver: RouterReceiver,
    *,
    keys: ControllerKeys | None = None,
    transport: str | None = None,
    spin_us: int | None = None,
    other_users: bool = False,
    log: Log = silent,
) -> RouterDriver:
    """Listen, on the running loop.

    Args:
        endpoints: Where; any number.
        routes: Where chunks go; read anew for each.
        receiver: Told what comes.
        keys: Encrypt, and let only known keys in; None lets everybody in.
        transport: The driver; see `choose`.
        spin_us: Busy polling; see `choose_spin`.
        other_users: Take ipc connections of other users as well, which only `loop` can.
        log: Called with an event's name and fields when something is wrong with the listeners.

    Raises:
        EndpointInUseError: Another controller has an endpoint.
        ConfigurationError: An endpoint cannot be bound, or there is no such driver, or it cannot do that.
    """
    spin = choose_spin(spin_us, transport)
    if choose(transport) == "loop":
        from zfabric.transport.loop_router import LoopRouter

        return LoopRouter(endpoints, routes, receiver, keys, log, spin_us=spin, other_users=other_users)
    if other_users:
        raise ConfigurationError("transport libzmq cannot take ipc connections of other users; use transport loop")
    from zfabric.transport.pump import PumpedRouter

    return PumpedRouter(endpoints, routes, receiver, keys, log)


def open_dealer(
    endpoint: str,
    receiver: DealerReceiver,
    rng: random.Random,
    credentials: Credentials | None = None,
    transport: str | None = None,
    spin_us: int | None = None,
) -> DealerDriver:
    """Connect, on the running loop.

    Args:
        endpoint: The controller's. Of several, with commas between them, or of a name with several addresses, one at a time is
            connected to.
        receiver: Told what comes.
        rng: Chance, for the jitter of reconnects.
        credentials: Keys for a controller that wants them.
        transport: The driver; see `choose`.
        spin_us: Busy polling; see `choose_spin`.

    Raises:
        ConfigurationError: The endpoint is none, or there is no such driver.
    """
    spin = choose_spin(spin_us, transport)
    if choose(transport) == "loop":
        from zfabric.transport.loop_dealer import LoopDealer

        return LoopDealer(endpoint, receiver, rng, credentials, spin_us=spin)
    from zfabric.transport.dealer import DealerLink

    return DealerLink(endpoint, receiver, rng, credentials)
