"""An incident on real processes: recorded, read after the controller's death, printed, and run again in the simulator."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from bench.traces import read
from tests.fabric import Process, processes, words
from zfabric import AsyncClient
from zfabric.cli import main
from zfabric.recording.arrivals import requests_of
from zfabric.recording.reader import Recording, read_recordings
from zfabric.testing import simulate_recording
from zfabric.testing.runner import main as run_simulator

CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"
SECRET = "nobodys-business"
TOKENS = 60


async def incident(endpoint: str, directory: Path) -> list[Path]:
    """Three requests, one of which loses its worker in mid-answer; at last the controller is killed as well."""
    files = [directory / name for name in ("controller.rec", "w0.rec", "w1.rec")]
    async with processes(directory) as children:
        controller = await Process.start(
            CONTROLLER, "--endpoint", endpoint, "--recovery-ms", "0", "--record", str(files[0]), directory=directory
        )
        children.append(controller)
        await controller.ready()
        workers = {}
        for number in (0, 1):
            worker = workers[f"w{number}"] = await Process.start(
                WORKER, "--endpoint", endpoint, "--name", f"w{number}", "--tokens-per-second", "200",
                "--record", str(files[1 + number]), directory=directory,
            )  # fmt: skip
            children.append(worker)
            await worker.ready()
        async with AsyncClient(endpoint, label="caller") as client:
            stream = client.stream("echo", f"{SECRET} b", max_new_tokens=TOKENS, temperature=0)
            await anext(stream)
            workers[stream.worker or ""].kill(signal.SIGKILL)
            async for _ in stream:
                pass
            assert stream.text == words(f"{SECRET} b", TOKENS)
            await client.generate("echo", "a", max_new_tokens=5, temperature=0)
            await client.embed("echo", ["a"])
            # What is told in a turn is written at its end, and this answer is of a later one.
            await client.status()
            controller.kill(signal.SIGKILL)
            await controller.ended()
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The recordings of one incident."""
    directory = tmp_path_factory.mktemp("incident")
    directory.chmod(0o700)
    return asyncio.run(incident(f"ipc://{directory}/c.sock", directory))


@pytest.fixture
def recording(files: list[Path]) -> Recording:
    return read_recordings(files)


def test_what_happened_is_told_in_order(recording: Recording) -> None:
    names = [event.name for event in recording.events if event.of == "controller"]
    lost = names.index("worker_lost")
    assert names[:5] == ["started", "config", "worker_registered", "worker_registered", "client_registered"]
    assert names[lost - 2 : lost] == ["submitted", "dispatched"]
    assert names[lost : lost + 4] == ["worker_lost", "ended", "submitted", "dispatched"]
    assert {event.name for event in recording.events if event.of == "worker"} == {"begun", "first_token", "answered"}
    times = [event.unix_ns for event in recording.events]
    assert times == sorted(times)
    assert recording.broken == []


def test_requests_are_put_together(recording: Recording) -> None:
    failed_over, short, vectors = requests_of(recording.events)
    assert (failed_over.attempts, failed_over.outcome, len(failed_over.workers)) == (2, "completed", 2)
    assert (short.attempts, short.outcome, short.operation) == (1, "completed", "generate")
    assert (vectors.operation, vectors.client) == ("embed", "client caller")


def test_no_prompt_and_no_answer_is_in_the_files(files: list[Path]) -> None:
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_a_timeline_is_printed_and_filtered(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    paths = list(map(str, files))
    assert main.main(["replay", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "worker_lost" in line and "in_flight=1" in line]
    assert main.main(["replay", *paths, "--json", "--event", "worker_lost"]) == 0
    (lost,) = json.loads(capsys.readouterr().out)
    assert main.main(["replay", *paths, "--json", "--event", "submitted"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert main.main(["replay", *paths, "--json", "--request", first["request"]]) == 0
    its = json.loads(capsys.readouterr().out)
    assert {event["attempt"] for event in its} == {0, 1}
    assert {event["request"] for event in its} == {first["request"]}
    assert main.main(["replay", *paths, "--json", "--worker", lost["worker"]]) == 0
    assert {event["worker"] for event in json.loads(capsys.readouterr().out)} == {lost["worker"]}
    assert main.main(["replay", *paths, "--json", "--model", "nothing"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main.main(["replay", str(files[0].parent / "none")]) == 2


@pytest.mark.parametrize("seed", range(5))
def test_the_simulator_goes_through_the_same(files: list[Path], seed: int) -> None:
    report = simulate_recording(files, seed)
    assert report.faults == {"worker killed": 1}
    assert report.operations == {"generate": 2, "embed": 1}
    assert report.outcomes == {"done": 3}
    assert report.failovers >= 1


async def test_a_controller_that_is_killed_and_comes_back_is_simulated_so(tmp_path: Path, ipc: str) -> None:
    file, arguments = tmp_path / "r", ("--endpoint", ipc, "--record", str(tmp_path / "r"))
    tmp_path.chmod(0o700)
    async with processes(tmp_path) as children:
        controller = await Process.start(CONTROLLER, *arguments, directory=tmp_path)
        worker = await Process.start(WORKER, "--endpoint", ipc, "--tokens-per-second", "100", directory=tmp_path)
        children += [controller, worker]
        await worker.ready()
        async with AsyncClient(ipc) as client:
            stream = client.stream("echo", "a b", max_new_tokens=400)
            await anext(stream)
            controller.kill(signal.SIGKILL)
            await controller.ended()
            controller = await Process.start(CONTROLLER, *arguments, directory=tmp_path)
            children.append(controller)
            async for _ in stream:
                pass
            assert stream.text == words("a b", 400)
        controller.kill(signal.SIGTERM)
        assert await controller.ended() == 0
    events = read_recordings([file]).events
    names = [event.name for event in events]
    assert (names.count("started"), names[-1]) == (2, "stopped")
    for seed in range(3):
        report = simulate_recording([file], seed)
        assert (report.faults, report.outcomes) == ({"controller killed": 1, "controller drains": 1}, {"done": 1})
        assert report.recovered == 1


def test_the_simulator_takes_recordings_from_its_command_line(
    files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [argument for file in files for argument in ("--recording", str(file))]
    monkeypatch.setattr("sys.argv", ["zfabric.testing", "--seeds", "2", "--jobs", "1", *given])
    assert run_simulator() == 0
    assert "worker killed 2" in capsys.readouterr().out


def test_the_benchmark_takes_its_arrivals(files: list[Path]) -> None:
    arrivals = read(files[0])
    assert [arrival.at_s for arrival in arrivals] == sorted(arrival.at_s for arrival in arrivals)
    assert (len(arrivals), arrivals[0].at_s) == (3, 0.0)
    assert all(arrival.answer_tokens >= 1 and arrival.prompt_tokens >= 1 for arrival in arrivals)
