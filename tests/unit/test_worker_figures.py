"""What a worker counts of its requests, and what its metrics say of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric

from tests.unit.worker_side import CLIENT, INSTANCE, WorkerSide, last, token
from zfabric.core.worker.figures import OTHER, WorkerFigures
from zfabric.core.worker.orders import Columns
from zfabric.errors import BackendError, RequestCancelledError, WorkerLostError
from zfabric.ids import milliseconds
from zfabric.limits import MEASURED_MODELS_MAX
from zfabric.monitoring.worker import metrics_of
from zfabric.wire import codec
from zfabric.wire.flow import CreditLine, Grant
from zfabric.wire.load import Load
from zfabric.wire.payloads import Usage


def ms(value: int) -> int:
    return milliseconds(value)


def test_times_are_those_of_the_first_token_the_rest_and_the_whole() -> None:
    side = WorkerSide()
    name = side.begin(1)
    side.session.emit([(name, token())], ms(30))
    for at in (40, 60):
        side.session.emit_columns(Columns([name], [1], ["x"]), ms(at))
    side.session.emit([(name, last(usage=Usage(5, 4, cached_tokens=2)))], ms(90))
    measured = side.session.observer.figures.models["m"]
    assert (measured.first_token.count, measured.first_token.total_ns) == (1, ms(30))
    # The mean of what is between four tokens, three times.
    assert (measured.between_tokens.count, measured.between_tokens.total_ns) == (3, ms(60))
    assert (measured.whole_time.count, measured.whole_time.total_ns) == (1, ms(90))
    assert (measured.prompt_tokens, measured.cached_tokens, measured.generation_tokens) == (5, 2, 4)
    assert measured.completed == 1


def test_an_answer_of_one_token_has_nothing_between_tokens() -> None:
    side = WorkerSide()
    side.session.emit([(side.begin(1), last())], ms(10))
    measured = side.session.observer.figures.models["m"]
    assert (measured.first_token.count, measured.between_tokens.count, measured.whole_time.count) == (1, 0, 1)


def test_a_continued_answer_counts_what_was_made_here() -> None:
    side = WorkerSide()
    name = side.begin(1, attempt=1, resume_from=100)
    side.session.emit([(name, token())], ms(10))
    side.session.emit([(name, last(usage=Usage(5, 102)))], ms(20))
    measured = side.session.observer.figures.models["m"]
    assert measured.generation_tokens == 2
    assert (measured.between_tokens.count, measured.between_tokens.total_ns) == (1, ms(10))


def test_failures_are_counted_by_their_codes() -> None:
    side = WorkerSide()
    names = [side.begin(number) for number in range(4)]
    side.session.fail(names[0], BackendError("x"), ms(1))
    side.session.fail(names[1], WorkerLostError("x"), ms(1))
    side.abort(2)
    side.session.stopped(names[2], ms(1))
    odd = BackendError("x")
    odd.code = 77_777  # type: ignore[misc]
    side.session.fail(names[3], odd, ms(1))
    figures = side.session.observer.figures
    assert figures.failures == {BackendError.code: 2, WorkerLostError.code: 1, RequestCancelledError.code: 1}
    measured = figures.models["m"]
    assert (measured.completed, measured.whole_time.count) == (0, 0)


def test_a_wait_for_credit_is_counted_once_and_timed() -> None:
    side = WorkerSide()
    name = side.begin(1, window=1)
    for at in (10, 20, 50):
        side.session.emit([(name, token())], ms(at))
        side.session.flush()
    figures = side.session.observer.figures
    assert (figures.credit_waiting, figures.credit_waits.count) == (1, 0)
    line = CreditLine(request=1, attempt=0, next=1, window=2)
    side.session.receive(*codec.pack(Grant(client=CLIENT, instance=INSTANCE, lines=[line])), ms(80))
    # From 20 ms on it had a unit too many; and after this grant it still has one.
    assert (figures.credit_waits.count, figures.credit_waits.total_ns) == (1, ms(60))
    assert figures.credit_waiting == 2
    side.session.emit([(name, last())], ms(100))
    assert (figures.credit_waiting, figures.credit_waits.count) == (2, 2)
    assert figures.credit_waits.total_ns == ms(60 + 20)


def test_models_without_end_share_one_line() -> None:
    figures = WorkerFigures()
    for number in range(MEASURED_MODELS_MAX + 489):
        figures.of(f"m{number}").completed += 1
    assert len(figures.models) == MEASURED_MODELS_MAX + 1
    assert figures.models[OTHER].completed == 489
    assert figures.of("m0") is figures.models["m0"]
    assert figures.of("") is figures.models[OTHER]


def samples(metrics: list[Metric], name: str) -> list[tuple[dict[str, str], float]]:
    return [(sample.labels, sample.value) for metric in metrics for sample in metric.samples if sample.name == name]


@pytest.fixture
def service() -> Any:
    load = Load(
        slots=4,
        kv_blocks_free=7,
        gauges={
            "kv_cache_use": 0.25,
            "prefix_cache_hits": 3.0,
            "draft_tokens": 9.0,
            "accepted_draft_tokens": 7.0,
            "step_ms": 20.0,
            "odd!": 1.0,
        },
    )
    counted = {"received_bytes": 10, "sent_bytes": 20, "connected": 1}
    return SimpleNamespace(load=load, units=9, figures=WorkerFigures(), counted=lambda: counted)


def test_what_engines_tell_alike_has_names_of_its_own(service: Any) -> None:
    service.figures.failed(BackendError.code)
    metrics = list(metrics_of(service))
    assert samples(metrics, "zfabric_kv_cache_usage_ratio") == [({}, 0.25)]
    assert samples(metrics, "zfabric_prefix_cache_hits_total") == [({}, 3.0)]
    assert samples(metrics, "zfabric_prefix_cache_queries_total") == []
    assert samples(metrics, "zfabric_draft_tokens_total") == [({}, 9.0)]
    assert samples(metrics, "zfabric_accepted_draft_tokens_total") == [({}, 7.0)]
    assert samples(metrics, "zfabric_engine_step_seconds") == [({}, 0.02)]
    assert samples(metrics, "zfabric_kv_cache_free_blocks") == [({}, 7.0)]
    assert samples(metrics, "zfabric_engine") == [({"figure": "odd_"}, 1.0)]
    assert samples(metrics, "zfabric_worker_request_errors_total") == [({"error": "BackendError"}, 1.0)]
    assert samples(metrics, "zfabric_transport_sent_bytes_total") == [({}, 20.0)]


def test_a_worker_that_loads_has_no_figures() -> None:
    nothing: Any = SimpleNamespace(load=None)
    assert list(metrics_of(nothing)) == []
