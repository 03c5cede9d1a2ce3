"""What engines tell of themselves, made fit for a beat: a beat leaves whatever they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from zfabric import limits
from zfabric.wire.load import Load
from zfabric.wire.plain import plain
from zfabric.worker.base import BaseModelWorker, EngineLoad

_UNSIGNED32: Final = 2**32 - 1
_UNSIGNED63: Final = 2**63 - 1
#: Rates over less than this are noise.
_RATE_NS: Final = 500_000_000


class LoadReports:
    """Asks all backends of a worker how they are, once a beat.

    A backend whose report cannot be used is logged once, until it gives another that can. Its progress then stands where
    it was, so an engine that has died in this way is found to hang.

    Args:
        backends: In the order of `Load.engines`.
        slots: What the operator set; None for what the backends tell.
        log: Called with an event's name and fields.
    """

    def __init__(self, backends: Sequence[BaseModelWorker], slots: int | None, log: Callable[..., Any]) -> None:
        self._backends = backends
        self._slots = slots
        self._log = log
        self._last: list[EngineLoad] = [EngineLoad()] * len(backends)
        self._faulty: dict[int, str] = {}
        self._units = 0
        self._reported_ns = 0

    def refresh(self, load: Load, units: int, now_ns: int) -> None:
        """Enter what the engines tell now. Args: units: Deltas that were made since the start."""
        reports = [self._report(number, backend) for number, backend in enumerate(self._backends)]
        load.waiting = min(sum(report.waiting for report in reports), _UNSIGNED32)
        load.engines = [report.progress for report in reports]
        load.progress = sum(progress for progress in load.engines if progress is not None) & _UNSIGNED63
        blocks = [report.kv_blocks_free for report in reports if report.kv_blocks_free is not None]
        load.kv_blocks_free = sum(blocks) if blocks else None
        slots = [report.slots for report in reports if report.slots is not None]
        if slots and self._slots is None:
            load.slots = min(sum(slots), limits.SLOTS_MAX)
        gauges = {name: value for report in reports for name, value in report.gauges.items()}
        load.gauges = dict(list(gauges.items())[: limits.GAUGES_MAX])
        elapsed_ns = now_ns - self._reported_ns
        if elapsed_ns > _RATE_NS:
            made = units - self._units
            load.tokens_per_second = round(made * 1e9 / elapsed_ns, 1) if self._reported_ns else 0.0
            self._units, self._reported_ns = units, now_ns

    def _report(self, number: int, backend: BaseModelWorker) -> EngineLoad:
        try:
            report, faults = _sound(backend.load_report())
        except Exception as error:  # noqa: BLE001 — whatever a backend raises must not cost the beat
            report, faults = self._last[number], f"{type(error).__name__}: {error}"
        if faults and faults != self._faulty.get(number):
            self._log("bad_load_report", backend=type(backend).__name__, error=faults)
        self._faulty[number] = faults
        self._last[number] = report
        return report


def _sound(report: EngineLoad) -> tuple[EngineLoad, str]:
    """A report whose values a beat can carry, and what was wrong with it. Raises: Exception: It is no report."""
    faults: list[str] = []
    gauges: dict[str, float] = {}
    for name, value in report.gauges.items():
        number = _finite(value)
        if not isinstance(name, str) or not name or number is None or not _encodes(name):
            faults.append(f"gauge {name!r} is {value!r}")
            continue
        if len(name) > limits.NAME_LENGTH_MAX:
            faults.append(f"name of gauge {name[:32]!r}… is longer than {limits.NAME_LENGTH_MAX}")
        gauges[name[: limits.NAME_LENGTH_MAX]] = number
    if len(gauges) > limits.GAUGES_MAX:
        faults.append(f"{len(gauges)} gauges are given, limit is {limits.GAUGES_MAX}")
    sound = EngineLoad(
        waiting=_count(report.waiting) or 0,
        kv_blocks_free=_count(report.kv_blocks_free),
        progress=_count(report.progress),
        slots=_count(report.slots),
        gauges=gauges,
    )
    return sound, "; ".join(faults[:8])


def _count(value: Any) -> int | None:
    """A number that is not negative. Raises: TypeError, ValueError, OverflowError: It is no number."""
    return None if value is None else min(max(0, int(value)), _UNSIGNED63)


def _finite(value: Any) -> float | None:
    """A figure, if it is one."""
    try:
        number = float(plain(value) if hasattr(value, "tolist") else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _encodes(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
