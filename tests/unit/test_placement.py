"""Simulated placement: caches that a plain model agrees with, and what policies come to on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.placement import Cache, Cluster, Trace, Turn, conversations, one_cache, play, read
from bench.record import Report
from bench.runner import Bench
from bench.scenarios import placement
from zfabric.core.controller.dispatch import POLICIES

CHATS = conversations(120, rate=2.0)
CLUSTER = Cluster(engines=4, cached_tokens=60_000)


def test_a_cache_keeps_what_was_used_last_and_tells_what_goes() -> None:
    gone: list[int] = []
    cache = Cache(3, gone.append)
    assert cache.use([1, 2, 3]) == 0
    assert cache.use([1, 2]) == 2
    assert cache.use([4]) == 0
    assert gone == [3]
    assert cache.use([1, 2, 3]) == 2


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_with_one_engine_every_policy_has_the_hits_of_one_cache(policy: str) -> None:
    alone = Cluster(engines=1, cached_tokens=40_000)
    assert play(CHATS, alone, policy).hit_rate == one_cache(CHATS, alone)


def test_a_time_to_the_first_token_is_what_was_not_cached_before_it() -> None:
    trace = Trace([Turn(0.0, [1, 2], 1), Turn(100.0, [1, 2, 3], 1)], 4_000)
    outcome = play(trace, Cluster(engines=2, cached_tokens=100_000), "prefix_aware")
    assert outcome.hit_rate == 2 / 5
    # One and two blocks of half a second each, and one token of a fiftieth.
    assert outcome.ttft_p50_s == pytest.approx(1.02)
    assert outcome.ttft_p99_s == pytest.approx(1.02)


def test_prefix_aware_comes_near_one_cache_and_has_first_tokens_sooner() -> None:
    aware, shortest = play(CHATS, CLUSTER, "prefix_aware"), play(CHATS, CLUSTER, "shortest_queue")
    assert aware.hit_rate >= 0.95 * one_cache(CHATS, CLUSTER)
    assert aware.ttft_p50_s <= shortest.ttft_p50_s * 0.6
    assert aware.ttft_p99_s <= shortest.ttft_p99_s / 2
    assert play(CHATS, CLUSTER, "prefix_aware", told=True) == play(CHATS, CLUSTER, "prefix_aware", told=True)


def test_a_trace_says_what_prompts_share(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 1_500, "input_length": 1_200, "output_length": 7, "hash_ids": [4, 5, 6]}
    path.write_text(json.dumps(row) + "\n")
    assert read(path) == Trace([Turn(1.5, [4, 5], 7)], 512)
    del row["hash_ids"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="has no hash_ids"):
        read(path)


async def test_the_scenario_reports_each_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_INDEX_BLOCKS", 10_000)
    monkeypatch.setattr(placement, "_LOOK_UPS", 10)
    monkeypatch.setattr(placement, "conversations", lambda *_, **__: CHATS)
    (tmp_path / "none.csv").write_text("TIMESTAMP\n")
    report = Report(placement.NAME, placement.TITLE)
    await placement.run(Bench(quick=True, say=lambda _: None, traces=[str(tmp_path / "none.csv")]), report)
    assert [row[0] for row in report.tables[0].rows] == [
        "one cache as large as all", "round_robin", "shortest_queue", "most_cached, told of evictions", "prefix_aware",
        "prefix_aware, told of evictions",
    ]  # fmt: skip
    assert "has no hash_ids" in report.skipped[0]
