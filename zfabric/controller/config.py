"""What an operator can set on a controller."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from zfabric import limits
from zfabric.core.controller.config import BrokerConfig
from zfabric.errors import ConfigurationError
from zfabric.recording.config import RecordingConfig
from zfabric.transport.curve import Credentials
from zfabric.transport.endpoints import check_endpoint, default_endpoint, is_local
from zfabric.transport.links import choose, choose_spin


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """The controller at which another one is a worker.

    Attributes:
        parent: Its endpoint.
        name: What this controller is called there.
        credentials: Keys for a parent that wants them: a worker's.
    """

    parent: str
    name: str
    credentials: Credentials | None = None

    def __post_init__(self) -> None:
        if "," in self.parent:
            raise ConfigurationError(f"parent is {self.parent!r}, a cell has one parent", parameter="parent")
        check_endpoint(self.parent)
        if not 1 <= len(self.name) <= limits.NAME_LENGTH_MAX or "/" in self.name:
            raise ConfigurationError(
                f"cell is {self.name!r}, it must be a name of 1 … {limits.NAME_LENGTH_MAX} characters without a slash",
                parameter="cell",
            )


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Settings of a controller.

    Attributes:
        endpoints: Where to listen; any number. tcp beyond loopback needs `public`.
        public: Listen on addresses that other hosts can reach.
        key: The controller's secret key file; with it every connection is encrypted and has to prove a known key.
        keyring: File of the known keys and what they may do (`KeyRing.load`); goes with `key`.
        other_users: Take ipc connections of other users as well: the socket's directory may be entered by all then. Clients and
            workers of other users connect only to a controller of root's.
        transport: The driver of its sockets, `loop` or `libzmq`; None is $ZFABRIC_TRANSPORT, else the default.
        spin_us: Busy polling: look for messages for so many microseconds after work before sleeping; None is
            $ZFABRIC_SPIN_US, else not at all.
        drain_ms: How long a drain waits for running requests.
        record: Where what happens is recorded, and how much of it is kept; None for no recording.
        broker: Policy, timings and bounds of the broker.
        cell: The controller at which this one is a worker that serves the sum of its models; None for none.
    """

    endpoints: tuple[str, ...] = field(default_factory=lambda: (default_endpoint(),))
    public: bool = False
    key: Path | None = None
    keyring: Path | None = None
    other_users: bool = False
    transport: str | None = None
    spin_us: int | None = None
    drain_ms: int = limits.DRAIN_MS
    record: RecordingConfig | None = None
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    cell: CellConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.endpoints, str):
            raise ConfigurationError(f"endpoints is the text {self.endpoints!r}, it must be a tuple of endpoints")
        if not 0 <= self.drain_ms <= limits.DEADLINE_MAX_MS:
            raise ConfigurationError(f"drain_ms is {self.drain_ms}, it must be 0 … {limits.DEADLINE_MAX_MS}")
        if not self.endpoints:
            raise ConfigurationError("no endpoint is given, one at least is needed")
        if (self.key is None) != (self.keyring is None):
            raise ConfigurationError("key and keyring go together, only one of them is given")
        choose(self.transport)
        choose_spin(self.spin_us, self.transport)
        for endpoint in self.endpoints:
            check_endpoint(endpoint, listens=True)
            if not self.public and not is_local(endpoint):
                raise ConfigurationError(
                    f"{endpoint} can be reached from other hosts; set public to allow it", endpoint=endpoint
                )
