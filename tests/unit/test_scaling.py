"""How many replicas a model should have, and requests for a model that has none yet."""

from __future__ import annotations

import msgspec
import pytest

from tests.broker import Bench, FakeClient
from zfabric.core.controller.scaling import Rule, Scaler, Signals
from zfabric.errors import ConfigurationError, DeadlineExceededError, NoWorkerError, UnknownModelError
from zfabric.limits import SCALE_LOOK_MS
from zfabric.monitoring.controller import broker_metrics
from zfabric.wire.status import ModelStatus, ScalingStatus


def rule(**fields: object) -> Rule:
    return msgspec.convert({"model": "m", "min": 0, "max": 8, "settle_s": 60, "idle_s": 120, **fields}, Rule)


def signals(ready: int, running: int, waiting: int = 0, wait_ms: float = 0.0, rate: float = 0.0) -> Signals:
    return Signals(ready, 10.0, running, waiting, wait_ms, rate)


@pytest.mark.parametrize(
    ("given", "told", "wanted"),
    [
        # ceil(24 / (10 * 0.8)), and no more than there may be.
        ({}, signals(2, 20, 4), 3),
        ({}, signals(2, 20, 400), 8),
        ({"min": 2}, signals(2, 0), 2),
        # 17 / 8 = 2.125 is within a tenth of two, and 18 / 8 is not.
        ({}, signals(2, 17), 2),
        ({}, signals(2, 18), 3),
        # Waiting for four times as long as may be doubles what is there, and no more; the slots alone want one.
        ({}, signals(3, 5, 1, wait_ms=4_000), 6),
        ({}, signals(3, 5, 1, wait_ms=1_500), 5),
        ({}, signals(3, 5, 1, wait_ms=900), 1),
        # ceil(900 / 200)
        ({"tokens_per_second": 200}, signals(2, 8, rate=900), 5),
        # 60 that take 6 s each are worked off within 60 s by 6 slots: ceil((20 + 6) / 8).
        ({"queue_ms": 10**6}, Signals(2, 10.0, 20, 60, service_s=6.0), 4),
        ({"queue_ms": 10**6, "catch_up_s": 6}, Signals(2, 10.0, 20, 36, service_s=6.0), 7),
        # The first request wants the first replica, whose slots nobody knows.
        ({}, Signals(0, 0.0, 0, 30), 1),
        ({}, Signals(0, 0.0, 0, 0), 0),
    ],
)
def test_the_formula(given: dict[str, object], told: Signals, wanted: int) -> None:
    assert Scaler(rule(settle_s=0, **given)).look(told, 0.0) == wanted


def test_a_new_controller_lets_nobody_go_that_was_there() -> None:
    scaler = Scaler(rule())
    assert [scaler.look(signals(3, 1), at) for at in (0, 59, 60, 119, 120)] == [3, 3, 3, 3, 1]
    bench = Bench(recovery_ms=3_000)
    client = bench.client()
    bench.broker.scale([rule()], bench.now_ns)
    assert told(client, "scaling", ScalingStatus) == []
    for name in ("w1", "w2"):
        bench.worker(name)
    bench.sleep(3_000 + SCALE_LOOK_MS)
    assert [(row.desired, row.ready) for row in told(client, "scaling", ScalingStatus)] == [(2, 2)]
    metrics = {metric.name: metric for metric in broker_metrics(bench.broker)}
    [sample] = metrics["zfabric_desired_replicas"].samples
    assert (sample.labels, sample.value) == ({"model": "m"}, 2)


def test_more_come_at_once_and_fewer_when_fewer_have_done_for_a_while() -> None:
    scaler = Scaler(rule())
    told = {0: 8, 1: 40, 2: 8, 30: 24, 60: 8, 61: 8, 62: 8, 90: 8, 91: 8}
    assert {at: scaler.look(signals(1, running), at) for at, running in told.items()} == {
        0: 1, 1: 5, 2: 5, 30: 5, 60: 5, 61: 5, 62: 3, 90: 3, 91: 1,
    }  # fmt: skip


def test_the_last_one_goes_when_nothing_has_been_asked_for_a_while() -> None:
    scaler = Scaler(rule())
    assert scaler.look(signals(1, 1), 0) == 1
    assert [scaler.look(signals(1, 0), at) for at in (1, 119, 120, 179, 180)] == [1, 1, 1, 1, 0]
    assert scaler.look(signals(0, 0, 1), 181) == 1


def test_a_rule_that_allows_nothing_is_none() -> None:
    with pytest.raises(msgspec.ValidationError, match="max is 1, it must be at least 1 and at least min, which is 2"):
        rule(min=2, max=1)


def told(client: FakeClient, what: str, kind: type) -> list:  # type: ignore[type-arg]
    [answer] = client.ask(what)
    return msgspec.msgpack.decode(answer.result, type=list[kind])  # type: ignore[valid-type]


def test_a_request_for_a_model_without_workers_waits_for_the_first_and_is_told_so() -> None:
    bench = Bench()
    client = bench.client()
    client.submit(1)
    assert client.codes() == {(1, 0): UnknownModelError.code}
    bench.broker.scale([rule()], bench.now_ns)
    [row] = told(client, "scaling", ScalingStatus)
    assert (row.desired, row.ready, row.min, row.max) == (0, 0, 0, 8)
    assert [model.name for model in told(client, "models", ModelStatus)] == ["m"]
    client.submit(2, deadline_ms=5_000)
    client.submit(3)
    bench.sleep(SCALE_LOOK_MS)
    [row] = told(client, "scaling", ScalingStatus)
    assert (row.desired, row.waiting) == (1, 2)
    [answer] = client.ask("requests")
    rows = msgspec.msgpack.decode(answer.result)["rows"]
    sentence = "no worker serves 'm' now, and its rule has one started; it waits for 600 s at the most"
    assert [(it["reason"], it["why"]) for it in rows] == [("no_worker", sentence)] * 2
    bench.sleep(5_000)
    [end] = client.terminals()
    assert (end.request, end.code) == (2, DeadlineExceededError.code)
    assert sentence in end.message
    # Longer than a model is remembered that has no rule.
    bench.sleep(300_000)
    worker = bench.worker(slots=4)
    assert [it.request for it in worker.dispatched()] == [3]
    bench.check()


def test_each_request_waits_for_as_long_as_the_rule_says() -> None:
    bench = Bench()
    client = bench.client()
    bench.broker.scale([rule(wait_s=10)], bench.now_ns)
    bench.sleep(60_000)
    client.submit(1)
    bench.sleep(6_000)
    client.submit(2)
    bench.sleep(4_100)
    [end] = client.terminals()
    assert (end.request, end.code) == (1, NoWorkerError.code)
    assert end.message == "no worker of 'm' has come up within 10 s, though its rule asks for one"
    # Without a rule it is a model as any other, that nobody serves.
    bench.broker.scale([], bench.now_ns)
    bench.sleep(31_000)
    assert client.codes() == {(2, 0): NoWorkerError.code}
    client.submit(3)
    assert client.codes() == {(3, 0): UnknownModelError.code}
    bench.check_rest()


def test_what_waits_while_the_last_one_drains_is_for_the_next_one() -> None:
    bench = Bench()
    client, worker = bench.client(), bench.worker(slots=1)
    bench.broker.scale([rule()], bench.now_ns)
    worker.load(draining=True, slots=1)
    client.submit(1)
    bench.sleep(200_000)
    worker.leave()
    bench.sleep(200_000)
    assert client.terminals() == []
    assert [it.request for it in bench.worker("w2").dispatched()] == [1]


def test_two_rules_for_one_model_are_refused() -> None:
    bench = Bench()
    with pytest.raises(ConfigurationError, match="model 'm' has two rules"):
        bench.broker.scale([rule(), rule(max=2)], bench.now_ns)
