"""What the controller tells of itself: results of QUERY, and the rows of the operator's tables."""

from __future__ import annotations

from msgspec import Struct

from zfabric.errors import Detail


class ModelStatus(Struct, kw_only=True):
    """One model, all its workers together. `defaults` are its own values of sampling parameters that a request leaves unset."""

    name: str
    aliases: list[str] = []
    workers: list[str] = []
    slots: int = 0
    in_flight: int = 0
    queued: int = 0
    context_length: int = 0
    capabilities: list[str] = []
    parameters: list[str] = []
    dimensions: int = 0
    details: dict[str, Detail] = {}
    defaults: dict[str, float] = {}


class WorkerStatus(Struct, kw_only=True):
    """One worker. `silence_ms` is the time since anything was heard of it; `failed` counts requests that ended in an
    error there."""

    name: str
    state: str
    models: list[str]
    slots: int
    in_flight: int
    running: int
    waiting: int
    speed: float
    tokens_per_second: float
    progress: int
    kv_blocks_free: int | None
    age_s: float
    silence_ms: float
    beats: bool
    dispatched: int
    finished: int
    failed: int
    gauges: dict[str, float] = {}


class FabricStatus(Struct, kw_only=True):
    """The controller in figures. Totals count from its start."""

    version: str
    protocol: int
    epoch: int
    uptime_s: float
    policy: str
    draining: bool
    recovering: bool
    clients: int
    workers: int
    models: int
    in_flight: int
    queued: int
    queued_bytes: int
    submitted: int
    rejected: int
    dispatched: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    recovered: int
    workers_lost: int
    clients_lost: int
    bad_frames: int
    policy_failures: int = 0
    transport: dict[str, int] = {}
