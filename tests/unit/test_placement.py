"""Simulated placement: caches that a plain model agrees with, and what policies come to on them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench.engines import placement as engines
from bench.placement import Cache, Cluster, Trace, Turn, conversations, one_cache, play, read
from bench.record import Report
from bench.runner import Bench
from bench.scenarios import placement
from zfabric.core.controller.dispatch import POLICIES
from zfabric.limits import PREFIX_BLOCK_CHARACTERS

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
    assert read(path).faster(10) == Trace([Turn(0.15, [4, 5], 7)], 512)
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


# ── on engines ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_replay_sends_what_shares_as_text_that_shares_when_it_is_due() -> None:
    trace = Trace([Turn(0.0, [1, 2], 64), Turn(0.02, [1, 2, 3], 16, chat=5)], 512)
    sent: list[tuple[str, int, int]] = []

    async def send(prompt: str, tokens: int, chat: int) -> engines.Answered:
        sent.append((prompt, tokens, chat))
        return engines.Answered(time.perf_counter() + 1.0, 10, 4, tokens)

    answers, seconds = await engines.replay(trace, engines.Words("a"), 2.0, send)
    (first, few, _), (second, fewer, chat) = sent
    assert (second.startswith(first), few, fewer, chat) == (True, 4, 1, 5)
    assert len(first) == 2 * PREFIX_BLOCK_CHARACTERS
    assert engines.Words("b").prompt([1, 2]) != first
    assert all(answer.ttft_s >= 1.0 for answer in answers)
    figures = engines.figures(answers, seconds)
    assert (figures["hit_rate"], figures["tokens_per_second"]) == (0.4, 5 / seconds)


def test_a_report_has_medians_and_the_oracle() -> None:
    rounds = {"a": [{"hit_rate": value} for value in (0.1, 0.3, 0.2)]}
    found = engines.report(Trace([Turn(0.0, [1], 1), Turn(1.0, [1], 1)], 512), rounds)
    assert found == {"one_cache_hit_rate": 0.5, "requests": 2, "systems": {"a": {"hit_rate": [0.2, 0.1, 0.3]}}}
