"""What an operator can set on a controller."""

from __future__ import annotations

from dataclasses import dataclass, field

from zfabric import limits
from zfabric.core.broker_config import BrokerConfig
from zfabric.errors import ConfigurationError
from zfabric.transport.endpoints import check_endpoint, default_endpoint, is_local


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Settings of a controller.

    Attributes:
        endpoints: Where to listen; any number. tcp beyond loopback needs `public`.
        public: Listen on addresses that other hosts can reach.
        drain_ms: How long a drain waits for running requests.
        broker: Policy, timings and bounds of the broker.
    """

    endpoints: tuple[str, ...] = field(default_factory=lambda: (default_endpoint(),))
    public: bool = False
    drain_ms: int = limits.DRAIN_MS
    broker: BrokerConfig = field(default_factory=BrokerConfig)

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ConfigurationError("no endpoint is given, one at least is needed")
        for endpoint in self.endpoints:
            check_endpoint(endpoint)
            if not self.public and not is_local(endpoint):
                raise ConfigurationError(
                    f"{endpoint} can be reached from other hosts; set public to allow it", endpoint=endpoint
                )
