"""Peers that were written from the document, against a real controller and against the library."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fromdocs import document
from tests.fromdocs.client import Answer, Client, Failed
from tests.fromdocs.controllers import ControllerThread
from tests.fromdocs.worker import Worker
from zfabric import BaseModelWorker, Delta, GenerateRequest, ModelInfo
from zfabric import Client as LibraryClient
from zfabric.backends.echo import EchoWorker
from zfabric.testing import run_backend
from zfabric.transport.curve import create_keys

GREEDY = {"temperature": 0.0}


def counted(count: int) -> str:
    """What the worker says."""
    return "".join(f"{number} " for number in range(count))


def ask(client: Client, count: int, window: int = 1_024, **sampling: object) -> Answer:
    """Have the worker count."""
    body = {"prompt": "count", "sampling": {**GREEDY, "max_new_tokens": count, **sampling}}
    return client.submit("generate", "counter", body, window)


@pytest.fixture
def controller(ipc: str) -> Iterator[ControllerThread]:
    with ControllerThread(ipc) as running:
        yield running


@pytest.fixture
def worker(controller: ControllerThread) -> Iterator[Worker]:
    with Worker(controller.endpoint, "w1") as running:
        yield running


@pytest.fixture
def client(controller: ControllerThread) -> Iterator[Client]:
    with Client(controller.endpoint) as running:
        yield running


def test_they_know_nothing_of_the_project() -> None:
    for name in ("document.py", "connection.py", "client.py", "worker.py"):
        tree = ast.parse((Path(__file__).parent / name).read_text())
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [module for module in modules if module.split(".")[0] == "zfabric"]


def test_a_stream_goes_as_far_as_its_credit(worker: Worker, client: Client) -> None:
    answer = client.result(ask(client, 50, window=4))
    assert (answer.text, answer.token_ids) == (counted(50), list(range(50)))
    assert (answer.worker, answer.finish_reason) == ("w1", "length")
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 50
    # A window of four, and credit when half of it is used: no chunk was larger, but for what the terminal brought.
    assert answer.chunks >= 10
    client.wait(lambda: client.beats > 0)


def test_without_credit_all_comes_with_the_terminal(worker: Worker, client: Client) -> None:
    answer = client.result(ask(client, 30, window=0))
    assert (answer.text, answer.chunks) == (counted(30), 1)


def test_a_unary_operation_gives_its_result(worker: Worker, client: Client) -> None:
    answer = client.result(client.submit("count_tokens", "counter", {"prompt": "one two three"}))
    assert answer.result == 3


def test_questions_are_answered(worker: Worker, client: Client) -> None:
    assert [row["name"] for row in client.ask("models")] == ["counter"]
    assert client.ask("model", name="counter")["workers"] == ["w1"]
    assert client.ask("workers")[0]["state"] == "ready"
    assert client.ask("status")["workers"] == 1
    assert client.ask("refresh") == ["w1"]
    with pytest.raises(Failed) as caught:
        client.ask("nonsense")
    assert caught.value.code == 40300
    with pytest.raises(Failed) as caught:
        client.ask("model", name="nobody's")
    assert caught.value.code == 40301


def test_a_deadline_ends_a_request_at_both_ends(worker: Worker, client: Client) -> None:
    worker.allowed = 2
    answer = client.submit("generate", "counter", {"prompt": "count", "sampling": GREEDY}, deadline_s=0.05)
    with pytest.raises(Failed) as caught:
        client.result(answer)
    assert caught.value.code == 49902
    client.wait(lambda: client.ask("status")["in_flight"] == 0)
    assert worker.aborted == [(answer.number, 0)]


def test_a_cancelled_request_is_stopped_and_frees_its_slot(worker: Worker, client: Client) -> None:
    worker.allowed = 2
    answer = ask(client, 50)
    client.wait(lambda: answer.next == 2)
    client.cancel(answer)
    client.wait(lambda: client.ask("status")["in_flight"] == 0)
    assert worker.aborted == [(answer.number, 0)]


def test_when_a_worker_dies_the_answer_goes_on_elsewhere(controller: ControllerThread, client: Client) -> None:
    with Worker(controller.endpoint, "first") as first:
        first.allowed = 5
        answer = ask(client, 40)
        client.wait(lambda: answer.next == 5)
        with Worker(controller.endpoint, "second") as second:
            first.die()
            client.result(answer)
            assert (answer.text, answer.attempt, answer.worker) == (counted(40), 1, "second")
            assert second.attempts == [1]


def test_a_client_that_lost_its_connection_claims_its_streams(worker: Worker, client: Client) -> None:
    worker.allowed = 3
    answer = ask(client, 40)
    client.wait(lambda: answer.next == 3)
    client.drop()
    worker.allowed = 10
    client.wait(lambda: client.welcome is not None)
    worker.allowed = 1 << 30
    client.result(answer)
    assert (answer.text, answer.attempt, worker.attempts) == (counted(40), 0, [0])
    assert len(set(client.sessions)) == 2


def test_what_ended_while_nobody_read_is_kept_for_its_claim(
    worker: Worker, client: Client, controller: ControllerThread
) -> None:
    worker.allowed = 3
    answer = ask(client, 40)
    client.wait(lambda: answer.next == 3)
    client.drop()
    worker.allowed = 1 << 30
    with Client(controller.endpoint) as other:
        other.wait(lambda: other.ask("status")["completed"] == 1)
    assert answer.next == 3
    client.result(answer)
    assert (answer.text, answer.attempt, worker.attempts) == (counted(40), 0, [0])


def test_what_cannot_go_on_elsewhere_waits_for_its_worker(worker: Worker, client: Client) -> None:
    """A sampled answer: another worker would draw another text."""
    worker.allowed = 3
    answer = ask(client, 40, temperature=1.0)
    client.wait(lambda: answer.next == 3)
    worker.drop()
    worker.allowed = 1 << 30
    client.result(answer)
    assert (answer.text, answer.attempt, worker.attempts) == (counted(40), 0, [0])


def test_a_controller_that_is_new_puts_both_ends_together(ipc: str) -> None:
    with ControllerThread(ipc) as former, Worker(ipc, "w1") as worker, Client(ipc) as client:
        worker.allowed = 3
        answer = ask(client, 40)
        client.wait(lambda: answer.next == 3)
        former.close()
        worker.allowed = 1 << 30
        with ControllerThread(ipc, recovery_ms=3_000):
            client.result(answer)
            assert (answer.text, answer.attempt, worker.attempts) == (counted(40), 0, [0])


def test_a_worker_that_drains_hands_back_the_rest(controller: ControllerThread, client: Client) -> None:
    with Worker(controller.endpoint, "w1") as leaving:
        leaving.allowed = 3
        answer = ask(client, 20)
        client.wait(lambda: answer.next == 3)
        with Worker(controller.endpoint, "w2"):
            assert client.ask("drain", worker="w1", limit_ms=50) == "w1"
            client.result(answer)
            assert (answer.text, answer.worker) == (counted(20), "w2")
            assert [row["name"] for row in client.ask("workers")] == ["w2"]


def test_a_lock_is_the_first_half_of_the_secrets_hash(worker: Worker, client: Client) -> None:
    client.result(ask(client, 1))
    assert worker.locks == [hashlib.sha256(client._secret).digest()[:16]]


def test_an_instance_that_another_client_has_is_refused(client: Client, controller: ControllerThread) -> None:
    other = Client(controller.endpoint)
    other.instance = client.instance
    with other:
        other.wait(lambda: other.welcome is not None)
        assert other.refused is not None
        assert other.refused.code == 50305
        assert other.instance != client.instance
        assert client.ask("status")["clients"] == 2


def test_a_name_that_a_live_worker_has_is_refused_until_that_one_leaves(
    worker: Worker, client: Client, controller: ControllerThread
) -> None:
    other = Worker(controller.endpoint, worker.name)
    with other.started():
        client.wait(lambda: other.refusals == [50305])
        assert client.ask("status")["workers"] == 1
        worker.close()
        assert other.registered.wait(20)
        assert client.result(ask(client, 3)).text == counted(3)


def test_what_is_no_use_is_named(worker: Worker, client: Client) -> None:
    answer = Answer(77, "generate", "counter", {}, 0, submitted=True)
    client.answers[77] = answer
    client._send(document.message("SUBMIT", [77, 0, "no operation", "counter"]), b"x")
    client.wait(lambda: answer.done)
    assert answer.error is not None
    assert answer.error.code == 40001
    client._send(document.message("QUERY", [5, "models", ["no", "map"]]))
    client.wait(lambda: len(client.faults) == 2)
    assert client.faults[1]["query"] == 5


def test_another_version_is_refused(controller: ControllerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fromdocs.client.version", lambda: 999)
    with Client(controller.endpoint) as client:
        assert client.refused is not None
        assert (client.refused.code, client.refused.details["peer"]) == (40002, 999)
        assert client.refused.details["controller"] == document.version()


def test_keys_are_certificates_of_zeromq(ipc: str, tmp_path: Path) -> None:
    for name in ("controller", "backend", "stranger"):
        create_keys(tmp_path, name)
    (tmp_path / "keyring.toml").write_text('[backend]\nrole = "client"\nkey = "backend.key"\n')
    with ControllerThread(ipc, keys=tmp_path):
        known = tmp_path / "controller.key"
        with Client(ipc, key=tmp_path / "backend.key_secret", controller_key=known) as client:
            assert client.ask("status")["clients"] == 1
            with pytest.raises(Failed) as caught:
                client.ask("refresh")
            assert caught.value.code == 40103


def test_the_library_is_served_by_the_documents_worker(worker: Worker, controller: ControllerThread) -> None:
    with LibraryClient(controller.endpoint) as library:
        completion = library.generate("counter", "count", max_new_tokens=30, temperature=0)
        assert (completion.text, completion.usage.completion_tokens) == (counted(30), 30)
        assert library.count_tokens("counter", "one two") == 2


class Twofold(BaseModelWorker):
    """Gives two choices, in turns, one of them without tokens."""

    parameters = frozenset({"n", "temperature", "max_new_tokens"})

    async def load(self) -> ModelInfo:
        return ModelInfo(name="twofold", capabilities=["generate"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        for word in ("a", "b"):
            yield Delta(text=word, token_ids=[1, 2], index=0)
            yield Delta(text=word.upper(), index=1)
        for index in range(request.sampling.n):
            yield Delta(finish_reason="stop", index=index)


def test_units_are_counted_over_all_choices() -> None:
    with run_backend(Twofold()) as library, Client(library.endpoint) as client:
        body = {"prompt": "x", "sampling": {**GREEDY, "n": 2}}
        answer = client.result(client.submit("generate", "twofold", body, window=3))
        assert answer.texts == {0: "ab", 1: "AB"}
        # Two tokens twice, two deltas without a token, and two that bring nothing but an end.
        assert answer.next == 8


def test_the_documents_client_is_served_by_the_library() -> None:
    with run_backend(EchoWorker()) as library, Client(library.endpoint) as client:
        body = {"prompt": "one two three", "sampling": {**GREEDY, "max_new_tokens": 3}}
        answer = client.result(client.submit("generate", "echo", body))
        assert answer.text == library.generate("echo", "one two three", max_new_tokens=3, temperature=0).text
        rows, dimensions, data = client.result(client.submit("embed", "echo", {"inputs": ["one", "two"]})).result
        vectors = library.embed("echo", ["one", "two"])
        assert (rows, dimensions) == vectors.shape
        assert data == vectors.astype("<f4").tobytes()
