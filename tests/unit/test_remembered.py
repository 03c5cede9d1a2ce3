"""Names that a worker announces and drops again: a controller remembers no more of them than it says."""

from __future__ import annotations

import pytest

from tests.broker import Bench, FakeClient, FakeWorker, model_of
from zfabric.errors import NoWorkerError, UnknownModelError
from zfabric.limits import MODEL_MEMORY_MS

MOST = 8


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.core.controller.queues.MODELS_REMEMBERED_MAX", MOST)
    monkeypatch.setattr("zfabric.core.controller.registry.ALIASES_REMEMBERED_MAX", MOST)


def test_a_worker_that_announces_others_with_each_message_is_remembered_by_few() -> None:
    bench = Bench()
    worker = FakeWorker(bench)
    for turn in range(20):
        worker.hello("w", models=[model_of(f"{turn}-{number}") for number in range(3)])
        # Those that are there, and those that may come back.
        assert len(bench.broker.registry.models) <= 3 + MOST
    names = list(bench.broker.registry.models)
    assert names[-3:] == ["19-0", "19-1", "19-2"]
    assert set(names) >= {"18-0", "18-1", "18-2", "17-2"}
    bench.sleep(MODEL_MEMORY_MS + 100)
    assert list(bench.broker.registry.models) == ["19-0", "19-1", "19-2"]
    # Of those that were forgotten no timer is left, and they can be served again.
    worker.hello("w", models=[model_of("0-0")])
    assert bench.broker.registry.models["0-0"].forget is None


def test_what_waits_for_a_model_is_not_forgotten_with_it() -> None:
    bench = Bench()
    client = FakeClient(bench).hello(1)
    worker = FakeWorker(bench)
    worker.hello("w", models=[model_of("wanted")], slots=0)
    client.submit(1, model="wanted")
    for turn in range(20):
        worker.hello("w", models=[model_of(f"{turn}-{number}") for number in range(3)], slots=0)
    assert "wanted" in bench.broker.registry.models
    client.submit(2, model="0-0")
    assert client.codes() == {(2, 0): UnknownModelError.code}
    bench.sleep(MODEL_MEMORY_MS + 100)
    assert client.codes() == {(1, 0): NoWorkerError.code}


def test_aliases_of_each_new_connection_are_remembered_by_few() -> None:
    bench = Bench()
    FakeWorker(bench).hello("stays", models=[model_of("m")])
    for turn in range(20):
        worker = FakeWorker(bench)
        worker.hello("w", models=[model_of("m", aliases=[f"{turn}-{number}" for number in range(3)])])
        worker.cut()
    model = bench.broker.registry.models["m"]
    assert len(model.aliases) == len(model.unheld) == MOST
    assert list(model.aliases)[-3:] == ["19-0", "19-1", "19-2"]
    assert bench.broker.registry.find("19-2") is model
    assert bench.broker.registry.find("0-0") is None
