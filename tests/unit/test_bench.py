"""What the benchmark suite computes; what it measures is its own affair."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as main
from bench import cores
from bench.balance import lower_bound_s, play, service_s
from bench.compare import compare, load
from bench.engines.answers import summary
from bench.engines.runs import Run
from bench.engines.runs import results as engine_results
from bench.record import Metric, Report, write
from bench.runner import Bench
from bench.scenarios import engines
from bench.subjects import SUBJECTS
from bench.traces import SHIPPED, Arrival, generate, read
from zfabric.core.controller.dispatch import POLICIES

SPEEDS = (2.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("better", "value", "met"), [("higher", 0.9, True), ("higher", 0.8, False), ("lower", 1.0, False)]
)
def test_a_goal_is_met_or_not(better: str, value: float, met: bool) -> None:
    assert Metric("m", value, "×", better, goal=0.9).met is met  # type: ignore[arg-type]


def test_results_hold_every_round_and_a_flat_map(tmp_path: Path) -> None:
    report = Report("relay", "Relay")
    report.metric("ratio", [0.5, 0.7, 0.9], "×", "higher", goal=0.9, reference="proxy")
    write(tmp_path / "run.json", {"cores": 2}, [report])
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert latest["metrics"]["relay.ratio"] == {
        "value": 0.7, "unit": "×", "better": "higher", "goal": 0.9, "reference": "proxy", "met": False,
    }  # fmt: skip
    assert load(tmp_path / "run.json")["relay.ratio"]["rounds"] == [0.5, 0.7, 0.9]
    with pytest.raises(ValueError, match="full result file"):
        load(tmp_path / "latest.json")


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([200.0, 210.0], "worse"),
        ([50.0, 52.0], "better"),
        ([95.0, 130.0], "within noise"),
        ([101.0, 102.5], "within noise"),
    ],
)
def test_a_change_is_told_from_noise(after: list[float], verdict: str) -> None:
    before = {"value": 100.0, "rounds": [98.0, 100.0], "better": "lower", "unit": "µs"}
    found = {**before, "value": sum(after) / len(after), "rounds": after}
    assert compare({"m": before}, {"m": found})[0].verdict == verdict


def test_cores_are_shared_out_only_where_each_process_gets_two() -> None:
    assert cores.shares(range(8), 3) == [[0, 1], [2, 3], [4, 5]]
    assert cores.shares([4, 5, 6, 7], 2) == [[4, 5], [6, 7]]
    assert cores.shares(range(5), 3) == []


def test_a_process_stays_on_the_cores_it_was_given() -> None:
    first = cores.usable()[:1]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        cores.pin(process.pid, first)
        assert os.sched_getaffinity(process.pid) == set(first)
        process.communicate(b"\n")


def test_each_published_form_of_a_trace_is_read(tmp_path: Path) -> None:
    azure, burst, other = tmp_path / "azure.csv", tmp_path / "burst.csv", tmp_path / "other.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:01.5000000,7,3\n2023-11-16 18:00:01.0000000,5,2\n"
    )
    burst.write_text("Timestamp,Model,Request tokens,Response tokens\n5,x,4,1\n")
    other.write_text("a,b\n1,2\n")
    assert read(azure) == [Arrival(0.0, 5, 2), Arrival(0.5, 7, 3)]
    assert read(burst) == [Arrival(0.0, 4, 1)]
    with pytest.raises(ValueError, match="no known form"):
        read(other)


def test_the_shipped_trace_is_what_its_generator_makes() -> None:
    shipped, made = read(SHIPPED), generate()
    assert [(a.prompt_tokens, a.answer_tokens) for a in shipped] == [(a.prompt_tokens, a.answer_tokens) for a in made]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("central", [True, False])
def test_no_policy_beats_the_bound(policy: str, central: bool) -> None:
    rng = random.Random(3)
    trace = [Arrival(number * 0.05, rng.randrange(1, 2_000), rng.randrange(1, 400)) for number in range(300)]
    outcome = play(trace, SPEEDS, policy, central=central)
    assert outcome.makespan_s >= lower_bound_s(trace, SPEEDS)
    assert outcome.wait_p99_s >= outcome.wait_p50_s >= 0


def test_one_request_takes_its_service_time() -> None:
    arrival = Arrival(0.0, 800, 50)
    assert play([arrival], (2.0,), "shortest_queue", central=True).makespan_s == pytest.approx(service_s(arrival, 2.0))


@pytest.fixture
def bench() -> Bench:
    return Bench(quick=False, say=lambda text: None)


async def test_an_engine_that_is_not_installed_is_left_out_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ENGINES", {"vllm": (("json", "no_such_engine"), [])})
    report = Report("engines", "Engines")
    await engines.run(bench, report)
    assert report.skipped == ["vllm: no_such_engine is not installed (make test installs all engines)"]
    assert not report.tables
    assert not report.metrics


async def test_an_engine_that_fails_says_why_in_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", {"runs": (("json",), []), "no_such_module": (("json",), [])})
    report = Report("engines", "Engines")
    await engines.run(bench, report)
    silent, missing = report.skipped
    assert silent == "runs: ended with 0: "
    assert missing.startswith("no_such_module: ended with 1: ")
    assert missing.endswith("No module named bench.engines.no_such_module")


def test_what_vllm_printed_becomes_ratios_of_its_rounds() -> None:
    speeds = {"fabric": [96.0, 98.0, 99.0], "bare": [100.0, 100.0, 100.0], "openai": [50.0, 49.0, 99.0]}
    speeds["gateway"] = [49.0, 50.0, 97.0]
    results = [
        {"system": name, "streams": 8, "tokens_per_second": 1, "ttft_ms_p50": 1, "runs": runs, "ttft_ms_runs": runs}
        for name, runs in speeds.items()
    ]
    report = Report("engines", "Engines")
    engines.tell(report, "vllm", {"results": results})
    metrics = {metric.name: metric for metric in report.metrics}
    assert metrics["engines.vllm.tokens_at_8_to_bare"].value == pytest.approx(0.98)
    assert metrics["engines.vllm.tokens_at_8_to_bare"].met
    assert metrics["engines.vllm.tokens_at_8_to_server"].rounds == pytest.approx([1.92, 2.0, 1.0])
    assert not metrics["engines.vllm.gateway_tokens_at_8_to_server"].met
    assert metrics["engines.vllm.gateway_ttft_at_8_to_server"].met
    assert len(report.tables[0].rows) == 4


def test_what_hf_api_costs_is_told_by_streams() -> None:
    fast, slow = Run(100.0, 10.0), Run(94.0, 10.6)
    runs = {(name, streams): [run] for name, run in (("direct", fast), ("fabric", slow)) for streams in (1, 64)}
    report = Report("engines", "Engines")
    engines.tell(report, "hf_api", {"results": engine_results(runs)})
    metrics = {metric.name.removeprefix("engines.hf_api."): metric for metric in report.metrics}
    assert {name: metric.met for name, metric in metrics.items()} == {
        "tokens_lost_at_1": False,
        "tokens_lost_at_64": False,
        "ttft_added_ms": True,
    }
    assert metrics["tokens_lost_at_64"].value == pytest.approx(6)
    assert metrics["ttft_added_ms"].value == pytest.approx(0.6)


async def test_a_run_is_on_the_driver_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """All daemons of it and its client; one that is put beside it is on its own at all three ends."""
    monkeypatch.setenv("ZFABRIC_TRANSPORT", "libzmq")
    for name, expected in (("zfabric", "libzmq"), ("zfabric ipc", "libzmq"), ("zfabric loop", "loop")):
        stack = SUBJECTS[name]()
        commands = [part.command for part in stack._parts]
        assert [command[command.index("--transport") + 1] for command in commands] == [expected, expected]
        assert stack._environment["ZFABRIC_TRANSPORT"] == expected
        # It has made directories, and nothing runs yet.
        await stack.__aexit__()


def test_drivers_are_chosen_by_one_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str | None, tuple[str, ...]]] = []

    async def run(scenarios: object, bench: Bench) -> list[Report]:
        seen.append((os.environ.get("ZFABRIC_TRANSPORT"), tuple(bench.beside)))
        return []

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setenv("ZFABRIC_TRANSPORT", "")
    output = ("--output", str(tmp_path))
    for arguments in ((), ("--transport", "libzmq"), ("--transport", "libzmq", "--transport", "loop")):
        with pytest.raises(SystemExit):
            main.app([*arguments, *output])
    assert seen == [("loop", ("zfabric libzmq",)), ("libzmq", ()), ("libzmq", ("zfabric loop",))]


def test_what_was_over_too_soon_to_be_measured_is_told_so() -> None:
    assert summary([]) == {"count": 0}
    assert summary([0.001, 0.002, 0.003]) == {"count": 3, "p50": 2.0, "p99": 3.0, "max": 3.0}
