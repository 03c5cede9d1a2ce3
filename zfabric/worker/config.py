"""What an operator can set on a worker process, whatever its backend."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from zfabric import limits
from zfabric.errors import ConfigurationError
from zfabric.recording.config import RecordingConfig
from zfabric.transport.curve import Credentials, default_credentials
from zfabric.transport.endpoints import check_endpoints, default_endpoint
from zfabric.transport.links import choose, choose_spin


def default_name() -> str:
    """host-pid: unique on a network of named hosts, and an operator can find the process."""
    return f"{socket.gethostname().split('.')[0]}-{os.getpid()}"


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Settings of a worker.

    Attributes:
        endpoint: The controller to dial. Of several, with commas between them, or of a name that has several addresses, the
            worker registers at each.
        name: Unique name of this worker.
        slots: Concurrent requests, None for the backend's own number.
        speed: Relative speed for `lottery` and `shortest_queue`.
        stream_interval: Tokens gathered into one delta after the first, which is never held back; 1 is each.
        beats: False registers a static worker, which is never removed for silence.
        credentials: Keys for a controller that wants them.
        transport: The driver of its socket, `loop` or `libzmq`; None is $ZFABRIC_TRANSPORT, else the default.
        spin_us: Busy polling: look for messages for so many microseconds after work before sleeping; None is
            $ZFABRIC_SPIN_US, else not at all.
        drain_ms: How long a drain lets running requests finish before it hands them back.
        record: Where what happens is recorded, and how much of it is kept; None for no recording.
    """

    endpoint: str = field(default_factory=default_endpoint)
    name: str = field(default_factory=default_name)
    slots: int | None = None
    speed: float = 1.0
    stream_interval: int = 1
    beats: bool = True
    credentials: Credentials | None = field(default_factory=default_credentials)
    transport: str | None = None
    spin_us: int | None = None
    drain_ms: int = limits.DRAIN_MS
    record: RecordingConfig | None = None

    def __post_init__(self) -> None:
        check_endpoints(self.endpoint)
        choose(self.transport)
        choose_spin(self.spin_us, self.transport)
        if not 1 <= len(self.name) <= limits.NAME_LENGTH_MAX:
            raise ConfigurationError(f"name has {len(self.name)} characters, 1 … {limits.NAME_LENGTH_MAX} are allowed")
        if self.slots is not None and not 1 <= self.slots <= limits.SLOTS_MAX:
            raise ConfigurationError(f"slots is {self.slots}, it must be 1 … {limits.SLOTS_MAX}")
        if self.stream_interval < 1:
            raise ConfigurationError(f"stream_interval is {self.stream_interval}, it must be at least 1")
        if not 0 <= self.speed <= limits.SPEED_MAX:
            raise ConfigurationError(f"speed is {self.speed}, it must be 0 … {limits.SPEED_MAX:g}", parameter="speed")
        if self.drain_ms < 0:
            raise ConfigurationError(f"drain_ms is {self.drain_ms}, it must be at least 0")
