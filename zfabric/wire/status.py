"""What the controller tells of itself: results of QUERY, and the rows of the operator's tables."""

from __future__ import annotations

from msgspec import Struct

from zfabric.errors import Detail


class ModelStatus(Struct, kw_only=True):
    """One model, all its workers together. What its workers announce differently is given as the first one has it. A model that
    is started when it is asked for may have none, and has a name alone then.

    Attributes:
        name: Its own name.
        aliases: Other names that stand for it now.
        workers: Names of those that serve it.
        slots: Requests that they take at a time, all together.
        in_flight: Requests that they have.
        queued: Requests that wait for one of them.
        context_length: Tokens of prompt and answer together, the least of all workers; 0 if unknown.
        capabilities: As announced.
        parameters: Parameters that are honoured; None where that is not known.
        dimensions: Length of an embedding; 0 if it makes none.
        details: As announced.
        defaults: Its own values of sampling parameters, which hold where a request leaves them unset.
        extra: Keys that a request's `extra` may have; None where any will do.
        paused_by: The operator who has its requests wait; "" where nobody does.
    """

    name: str
    aliases: list[str] = []
    workers: list[str] = []
    slots: int = 0
    in_flight: int = 0
    queued: int = 0
    context_length: int = 0
    capabilities: list[str] = []
    parameters: list[str] | None = None
    dimensions: int = 0
    details: dict[str, Detail] = {}
    defaults: dict[str, float] = {}
    extra: list[str] | None = []
    paused_by: str = ""


class ScalingStatus(Struct, kw_only=True):
    """How many replicas a model that has a rule for them should have, and by what.

    Attributes:
        model: Its own name.
        desired: Replicas that there should be.
        min, max: What the rule allows.
        ready: Replicas that take requests.
        running: Requests that they have.
        waiting: Requests that wait for one of them.
        longest_wait_s: Of those that wait, in seconds.
        slots: Requests that one replica takes at a time; 0 while there is none.
        tokens_per_second: Of all replicas, in the last beat interval.
        service_s: How long a request holds a slot, on average, in seconds; 0 if none has ended.
    """

    model: str
    desired: int
    min: int = 0
    max: int = 0
    ready: int = 0
    running: int = 0
    waiting: int = 0
    longest_wait_s: float = 0.0
    slots: float = 0.0
    tokens_per_second: float = 0.0
    service_s: float = 0.0


class WorkerStatus(Struct, kw_only=True):
    """One worker.

    Attributes:
        name: Its name.
        state: "ready", "draining", or "stalled" if one of its engines hangs.
        models: What it serves.
        slots: Requests that it takes at a time.
        in_flight: Requests that hold a slot of it, as the controller sees it.
        running: Requests in its engines' batches, as it says.
        waiting: Requests that its engines hold back, as it says.
        speed: Relative speed, as announced.
        tokens_per_second: Drawn in the last beat interval.
        progress: Sum of its engines' counters.
        kv_blocks_free: Free cache blocks, None where the engine tells none.
        age_s: Seconds since its session began.
        silence_ms: Milliseconds since anything was heard of it.
        beats: Whether it is lost if it says nothing.
        dispatched: Requests that it was given since its session began.
        finished: Those that ended without an error.
        failed: Those that ended in an error there.
        buffered_bytes: Bytes that wait in the controller for it to read them.
        gauges: Whatever else its engines tell.
        build: Version of its program.
        minor: Minor version of the protocol that is spoken with it.
        drained_by: The operator who has it take nothing new; "" where nobody does.
        circuits: By model, "open" or "half open" where its requests failed one after the other. Since version 2.2.
        elsewhere: Of its slots, those that other controllers use or are to have. Since version 2.4.
    """

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
    buffered_bytes: int = 0
    gauges: dict[str, float] = {}
    build: str = ""
    minor: int = 0
    drained_by: str = ""
    circuits: dict[str, str] = {}
    elsewhere: int = 0


class SlowReader(Struct, kw_only=True):
    """A client or worker that has not read what was sent to it.

    Attributes:
        name: "client" or "worker", and the client's label or session number, or the worker's name.
        buffered_bytes: Bytes that wait in the controller.
    """

    name: str
    buffered_bytes: int


class FabricStatus(Struct, kw_only=True):
    """The controller in figures. Totals count from its start.

    Attributes:
        version: Of its program.
        protocol: Version of the protocol.
        epoch: Its random number; it changes at a restart.
        uptime_s: Seconds since its start.
        policy: Name of its dispatch policy.
        draining: Whether it takes no new requests.
        recovering: Whether it is new, and running streams may be claimed.
        clients: Connected clients.
        workers: Registered workers.
        models: Models that somebody serves.
        in_flight: Requests that hold a slot of a worker.
        queued: Requests that wait.
        queued_bytes: Bytes of their bodies.
        submitted: Requests accepted.
        rejected: Requests ended at once.
        dispatched: Requests given to workers.
        completed: Requests that ended without an error.
        failed: Requests that ended in an error of a worker, or with it.
        cancelled: Requests that their client cancelled.
        expired: Requests whose deadline passed.
        recovered: Streams that went on after a lost connection.
        workers_lost: Sessions of workers whose connection was lost, or that were silent for too long.
        clients_lost: Sessions of clients whose connection was lost.
        bad_frames: Messages that were no use.
        policy_failures: Calls of an operator's own policy that failed.
        transport: Figures of the transport, by name (docs/transport.md).
        slow_readers: Clients and workers for which something waits, those with most of it.
        workers_left: Workers that said goodbye.
        clients_left: Clients that said goodbye.
        minor: Minor version of the protocol that it speaks.
        unix_s: Seconds since 1970 by its host's clock, by which its log is; 0 where it has none.
    """

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
    slow_readers: list[SlowReader] = []
    workers_left: int = 0
    clients_left: int = 0
    minor: int = 0
    unix_s: float = 0.0
