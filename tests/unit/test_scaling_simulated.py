"""Simulated scaling: what replicas cost, whose requests are in time, and that an oracle is hard to beat."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.record import Report
from bench.runner import Bench
from bench.scaling import LOAD_S, bursts, by_rule, fixed, oracle, play, slots_for
from bench.scenarios import scaling
from bench.traces import Arrival, generate
from zfabric.core.controller.scaling import Rule, Signals

TRACE = generate(800)
RULE = Rule(model="m", min=1, max=8, settle_s=60)


def test_fixed_replicas_cost_their_time() -> None:
    few, many = (play(TRACE, fixed(number), number) for number in (2, 4))
    assert many.gpu_hours == pytest.approx(2 * few.gpu_hours, rel=0.2)
    assert many.in_time >= few.in_time
    assert (few.most, many.most) == (2, 4)


def test_the_first_request_of_all_waits_for_a_load_and_no_longer() -> None:
    # One prompt of a second, ten seconds after the beginning: a look, and a load.
    outcome = play([Arrival(0.0, 8, 1), Arrival(10.0, 8_000, 50)], by_rule(Rule(model="m", min=0, max=1)), 0)
    assert LOAD_S <= outcome.late_p99_s <= LOAD_S + 1


def test_the_rule_is_between_too_few_and_the_oracle() -> None:
    known = oracle(TRACE)
    best = play(TRACE, known, known(Signals(0, 0.0, 0, 0), 0.0))
    ruled, few = play(TRACE, by_rule(RULE), 1), play(TRACE, fixed(1), 1)
    assert few.in_time < ruled.in_time <= best.in_time
    assert best.gpu_hours < ruled.gpu_hours < 8 * few.gpu_hours


def test_silence_costs_nothing_where_the_last_one_may_go() -> None:
    twice = bursts(TRACE, 2, silence_s=3_600)
    outcome = play(twice, by_rule(Rule(model="m", min=0, max=8, settle_s=60, idle_s=60)), 1)
    assert outcome.gpu_hours < play(twice, by_rule(RULE), 1).gpu_hours - 0.9


def test_slots_are_what_a_replica_serves_in_time() -> None:
    # A prompt takes a second of nine: of every nine slots one computes a prompt, and that may be for 0.7 of the time.
    assert slots_for([Arrival(0.0, 8_000, 400)]) == 6
    assert slots_for([Arrival(0.0, 8, 400)]) == 16


async def test_the_scenario_reports_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "bursts", lambda _: bursts(TRACE, 2))
    (tmp_path / "none.csv").write_text("TIMESTAMP\n")
    report = Report(scaling.NAME, scaling.TITLE)
    await scaling.run(Bench(quick=True, say=lambda _: None, traces=[str(tmp_path / "none.csv")]), report)
    ways = [row[0] for row in report.tables[0].rows]
    assert ways[0] == "oracle"
    assert {"rule", "rule, settle_s = 60", "rule, busy = 0.5"} <= set(ways)
    assert "no known form of a trace" in report.skipped[0]
