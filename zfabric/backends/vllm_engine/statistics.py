"""What the engine tells of itself, for the worker's beats."""

from __future__ import annotations

from typing import Any

from zfabric.worker.base import EngineLoad


class Statistics:
    """Sums over the engine's data-parallel ranks; each reports after every step of its own.

    Attributes:
        kv_blocks: Blocks of the cache in all ranks, 0 until the engine has told.
    """

    def __init__(self) -> None:
        self.kv_blocks = 0
        self._ranks: dict[int, Any] = {}
        self._steps = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def record(self, rank: int, scheduler: Any) -> None:
        """One rank has made a step."""
        self._steps += 1
        if scheduler is None:
            return
        self._ranks[rank] = scheduler
        prefix = scheduler.prefix_cache_stats
        if prefix is not None:
            self._prefix_queries += prefix.queries
            self._prefix_hits += prefix.hits

    def load(self, slots: int | None) -> EngineLoad:
        """What a beat carries.

        Args:
            slots: Room now, None for the usual number.
        """
        ranks = list(self._ranks.values())
        running = sum(rank.num_running_reqs for rank in ranks)
        waiting = sum(rank.num_waiting_reqs for rank in ranks)
        use = sum(rank.kv_cache_usage for rank in ranks) / len(ranks) if ranks else 0.0
        gauges = {
            "running": running,
            "waiting": waiting,
            "kv_cache_use": round(use, 4),
            "prefix_cache_queries": self._prefix_queries,
            "prefix_cache_hits": self._prefix_hits,
            "steps": self._steps,
        }
        return EngineLoad(
            waiting=waiting,
            kv_blocks_free=round(self.kv_blocks * (1 - use)),
            progress=self._steps,
            slots=slots,
            gauges={name: float(value) for name, value in gauges.items()},
        )
