"""What the engine tells of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def others_count() -> bool:
    """Whether plug-ins of vLLM's want its statistics of iterations."""
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    return bool(load_stat_logger_plugin_factories())


def statistics_logger(record: Callable[[int, Any], None]) -> Callable[[Any, int], Any]:
    """A factory of vLLM's loggers of statistics that calls `record(engine, scheduler_stats)` at every step."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._engine = engine_index

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            record(self._engine, scheduler_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return Recorder


def record_alone(engine: Any, record: Callable[[int, Any], None]) -> None:
    """Have nothing but `record` called at every step, before the engine's reader starts.

    Beside the loggers that it is given vLLM keeps dozens of metrics for Prometheus, an eighth of the worker's time, which
    nobody can ask this process for. Where plug-ins of vLLM's want statistics, all stays as it is.
    """
    if not others_count():
        engine.logger_manager = _Recorder(record)


class _Recorder:
    """Stands in for vLLM's manager of loggers."""

    def __init__(self, record: Callable[[int, Any], None]) -> None:
        self._record = record

    def record(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: int = 0, **_: Any) -> None:
        self._record(engine_idx, scheduler_stats)

    def log(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, *_: Any) -> None:
        """The worker knows."""

    def record_admission_rejection(self, *_: Any) -> None:
        """The request's caller is told."""
