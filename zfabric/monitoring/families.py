"""Short ways to write families of metrics, for collectors that read figures which somebody else counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from zfabric.core.histogram import BOUNDS_NS, Histogram
from zfabric.errors import BY_CODE

_BOUNDS = (*(f"{bound / 1e9:g}" for bound in BOUNDS_NS), "+Inf")

#: Values by the values of their labels.
Rows = Mapping[tuple[str, ...], float]


def gauge(name: str, meaning: str, rows: Rows | float, *labels: str) -> Metric:
    """What stands at a value now."""
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for values, value in _rows(rows):
        family.add_metric(values, value)
    return family


def counter(name: str, meaning: str, rows: Rows | float, *labels: str) -> Metric:
    """What only grows. Args: name: Without `_total`."""
    family = CounterMetricFamily(name, meaning, labels=labels)
    for values, value in _rows(rows):
        family.add_metric(values, value)
    return family


def histogram(name: str, meaning: str, rows: Mapping[tuple[str, ...], Histogram], *labels: str) -> Metric:
    """Durations, in seconds."""
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for values, measured in rows.items():
        buckets, so_far = [], 0
        for bound, count in zip(_BOUNDS, list(measured.counts), strict=True):
            so_far += count
            buckets.append((bound, so_far))
        family.add_metric(values, buckets, measured.total_ns / 1e9)
    return family


def errors(name: str, meaning: str, codes: Mapping[int, int]) -> Metric:
    """Counts by error code, as those of the classes."""
    return counter(name, meaning, {(BY_CODE[code].__name__,): count for code, count in codes.items()}, "error")


def transport(figures: Mapping[str, int], levels: Collection[str]) -> Iterator[Metric]:
    """What a link counted. Args: levels: Those that go up and down."""
    for name, value in figures.items():
        make = gauge if name in levels else counter
        yield make(f"zfabric_transport_{name}", f"Figure {name!r} of the transport (docs/transport.md).", value)


def _rows(rows: Rows | float) -> Iterable[tuple[tuple[str, ...], float]]:
    return rows.items() if isinstance(rows, Mapping) else [((), rows)]
