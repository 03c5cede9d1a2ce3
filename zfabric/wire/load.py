"""What a worker tells of itself while it serves: the body of a LOAD, which is in a HELLO as well.

A MessagePack array in field order, as all bodies of control messages: a receiver ignores fields at the end that it does not know.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from zfabric.limits import GAUGES_MAX, PREFIX_HASH_BYTES, PREFIX_TOLD_BLOCKS, SLOTS_MAX, WORKER_MODELS_MAX
from zfabric.wire.fields import Attempt, Finite, Name, Unsigned32, Unsigned63

Hashes = Annotated[bytes, Meta(max_length=PREFIX_TOLD_BLOCKS * PREFIX_HASH_BYTES)]


class CachedBlocks(Struct, array_like=True, kw_only=True, gc=False):
    """What an engine's cache has of a model's prompts, as it changes. Blocks are named by the hashes of their tokens that a
    SUBMIT's `prefix` has, 8 bytes each.

    Attributes:
        model: The model's own name; what is no model of the worker is ignored.
        stored: Blocks that are cached now, those of one prompt in its order.
        removed: Blocks that are cached no more.
        whole: Nothing is cached but `stored` and what is told after it: the cache was cleared, or the session is new.
        unit: Tokens that the engine caches at once: of a prompt, so many at the end may never be cached.
    """

    model: Name
    stored: Hashes = b""
    removed: Hashes = b""
    whole: bool = False
    unit: Unsigned32 = 0


class StreamUnits(Struct, array_like=True, kw_only=True, gc=False):
    """How far a worker is with an attempt.

    Attributes:
        instance: Of its client, from the DISPATCH, as the others.
        request: Its number.
        attempt: Which attempt of it.
        units: Units that were made so far, counted from the answer's start.
    """

    instance: Unsigned63
    request: Unsigned63
    attempt: Attempt
    units: Unsigned32


class Load(Struct, array_like=True, kw_only=True, gc=False):
    """worker → controller at every beat, and whenever slots or state change.

    Attributes:
        running: Requests in the engines' batches.
        waiting: Requests that the engines hold back.
        slots: Concurrent requests the worker takes now.
        progress: Sum of what `engines` says, for operators.
        tokens_per_second: Drawn in the last beat interval.
        dispatches: Messages DISPATCH of this session seen so far: what the figures above already include.
        kv_blocks_free: Free cache blocks, None where the engine tells none.
        draining: Finishes what it has and takes nothing new.
        gauges: Whatever else the engine tells (cache use, prefix hits …).
        engines: One counter for each engine of the worker, which moves only when that engine does; one that has work and
            does not move has hung. None where an engine does not tell: such a one is never taken for hung.
        streams: How far running attempts are, where the BEAT before asked for it; as many as fit. Since version 2.1.
        cached: What became cached, and what is no more, since the LOAD before. Since version 2.3.
        elsewhere: Of its slots, those that other controllers use or are to have. Since version 2.4; to a controller of an
            earlier version `slots` is told without them.
    """

    running: Unsigned32 = 0
    waiting: Unsigned32 = 0
    slots: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] = 0
    progress: Unsigned63 = 0
    tokens_per_second: Finite = 0.0
    dispatches: Unsigned63 = 0
    kv_blocks_free: int | None = None
    draining: bool = False
    gauges: Annotated[dict[Name, Finite], Meta(max_length=GAUGES_MAX)] = {}
    engines: Annotated[list[Unsigned63 | None], Meta(max_length=WORKER_MODELS_MAX)] = []
    streams: Annotated[list[StreamUnits], Meta(max_length=SLOTS_MAX)] = []
    cached: Annotated[list[CachedBlocks], Meta(max_length=WORKER_MODELS_MAX)] = []
    elsewhere: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] = 0
