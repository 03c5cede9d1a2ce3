"""What can be set on the broker core."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zfabric import limits
from zfabric.errors import ConfigurationError


@dataclass(kw_only=True)
class BrokerConfig:
    """Policy, timings and bounds; see `zfabric.limits` for the reasons of the defaults.

    A broker has a copy of its own, in which its operator may change what is read anew at each use (`settings`).

    Attributes:
        policy: Name of a dispatch policy (`zfabric.core.controller.dispatch.POLICIES`).
        beat_ms, lease_ms: Workers beat so often, and are removed after so long a silence.
        stall_ms: An engine with work that makes no progress for so long loses its requests.
        recovery_ms: How long after the start running streams may be claimed.
        claim_ms: How long requests outlive a lost connection: after so long unclaimed they are stopped.
        queue_depth_max, queue_bytes_max: Waiting requests of one kind for one model, and bytes of all waiting bodies.
        client_requests_max: Requests in flight per client.
        clients_max, workers_max: Sessions.
        circuit_failures: Failures in a row after which a worker gets no requests for the model for a while; 0 for never.
        imbalance_requests, imbalance_ratio: How much busier than the least loaded one a worker may be for the keys that it has
            (`zfabric.core.controller.dispatch.sticky_least_loaded`).
        adapters_per_host: Adapters that are loaded at one worker at once; 0 for loading none on demand.
        adapter_idle_ms: An adapter that no request has used for so long is unloaded.
        adapter_spread: Requests, running and waiting, for each host of an adapter.
    """

    policy: str = "shortest_queue"
    beat_ms: int = limits.BEAT_MS
    lease_ms: int = limits.LEASE_MS
    stall_ms: int = limits.STALL_MS
    recovery_ms: int = limits.RECOVERY_MS
    claim_ms: int = limits.CLAIM_MS
    queue_depth_max: int = limits.QUEUE_DEPTH_MAX
    queue_bytes_max: int = limits.QUEUE_BYTES_MAX
    client_requests_max: int = limits.CLIENT_REQUESTS_MAX
    clients_max: int = limits.CLIENTS_MAX
    workers_max: int = limits.WORKERS_MAX
    circuit_failures: int = limits.CIRCUIT_FAILURES
    imbalance_requests: int = limits.IMBALANCE_REQUESTS
    imbalance_ratio: float = limits.IMBALANCE_RATIO
    adapters_per_host: int = limits.ADAPTERS_PER_HOST
    adapter_idle_ms: int = limits.ADAPTER_IDLE_MS
    adapter_spread: int = limits.ADAPTER_SPREAD

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "policy":
                continue
            least = 0 if name in ("recovery_ms", "circuit_failures", "adapters_per_host") else 1
            if not least <= value < math.inf:
                raise ConfigurationError(f"{name} is {value}, it must be a number of at least {least}", parameter=name)
        if self.lease_ms < 2 * self.beat_ms:
            raise ConfigurationError(
                f"lease_ms is {self.lease_ms}, it must be at least twice beat_ms, which is {self.beat_ms}"
            )
