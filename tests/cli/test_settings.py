"""Where settings come from, and what wrong ones lead to."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from zfabric import Client
from zfabric.cli import controller, main, worker
from zfabric.controller.config import ControllerConfig


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the daemons would have been started with; nothing is started."""
    seen: list[Any] = []

    def note(*arguments: Any) -> Any:
        seen.append(arguments)

        async def nothing() -> int:
            return 0

        return nothing()

    def run(work: Coroutine[Any, Any, int], *, use_uvloop: bool) -> int:
        work.close()
        return 0

    for module in (controller, worker):
        monkeypatch.setattr(module, "serve", note)
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("ZFABRIC_ENDPOINT", f"ipc://{tmp_path}/default.sock")
    return seen


def configuration(started: list[Any]) -> ControllerConfig:
    found: ControllerConfig = started[-1][0]
    return found


def test_flags_before_environment_before_file(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "some.toml"
    file.write_text('[controller]\npolicy = "lottery"\nbeat_ms = 500\nlease_ms = 5000\n[worker]\nname = "other"\n')
    assert controller.main([]) == 0
    assert configuration(started).broker.policy == "shortest_queue"
    assert configuration(started).endpoints == (f"ipc://{tmp_path}/default.sock",)
    assert controller.main(["--config", str(file)]) == 0
    assert (configuration(started).broker.policy, configuration(started).broker.beat_ms) == ("lottery", 500)
    monkeypatch.setenv("ZFABRIC_CONTROLLER_POLICY", "round_robin")
    monkeypatch.setenv("ZFABRIC_CONFIG", str(file))
    assert controller.main([]) == 0
    assert (configuration(started).broker.policy, configuration(started).broker.beat_ms) == ("round_robin", 500)
    assert (
        controller.main(["--policy", "power_of_two", "--endpoint", "tcp://127.0.0.1:1", "--endpoint", "tcp://[::1]:2"])
        == 0
    )
    assert configuration(started).broker.policy == "power_of_two"
    assert configuration(started).endpoints == ("tcp://127.0.0.1:1", "tcp://[::1]:2")


def test_the_users_own_file_is_found(started: list[Any], tmp_path: Path) -> None:
    (tmp_path / "zfabric").mkdir()
    (tmp_path / "zfabric" / "zfabric.toml").write_text('[controller]\npolicy = "lottery"\n')
    assert controller.main([]) == 0
    assert configuration(started).broker.policy == "lottery"


def test_a_user_without_a_home_that_can_be_seen_has_no_file(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a service, or after a change of user."""

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "is_file", refused)
    assert controller.main([]) == 0
    assert controller.main(["--config", "/nobody/x.toml"]) == 2


@pytest.mark.parametrize(
    ("arguments", "text", "says"),
    [
        ([], '[controller]\npolicee = "x"\n', "policee"),
        ([], "[controller]\nbeat_ms = 'soon'\n", "beat"),
        ([], '[controler]\npolicy = "lottery"\n', "'controler'"),
        ([], 'policy = "lottery"\n', "'policy'"),
        ([], "[controller\n", "is not TOML"),
        (["--config", "/nonexistent.toml"], "", "does not exist"),
        (["--policy", "fastest"], "", "not one of"),
        (["--policy", "os:nothing"], "", "cannot be imported"),
        (["--policy", ":nothing"], "", "cannot be imported"),
        (["--policy", ".os:nothing"], "", "cannot be imported"),
        (["--policy", "os:name"], "", "not a function"),
        (["--drain-ms", "-1"], "", "drain_ms is -1"),
        (["--endpoint", "tcp://127.0.0.1:99999"], "", "has the port '99999'"),
        (["--lease-ms", "10"], "", "at least twice"),
        (["--endpoint", "tcp://0.0.0.0:1"], "", "set public"),
        (["--endpoint", "http://x"], "", "not ipc://"),
        (["--endpoint", "ipc://" + "x" * 200], "", "too long"),
        (["--queue-depth-max", "0"], "", "at least 1"),
        (["--nonsense"], "", "nonsense"),
    ],
)
def test_wrong_settings_are_named(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str, says: str
) -> None:
    file = tmp_path / "some.toml"
    file.write_text(text)
    given = arguments if "--config" in arguments else [*arguments, "--config", str(file)]
    assert controller.main(given) == 2
    assert says in capsys.readouterr().err
    assert started == []


def test_a_worker_takes_the_options_of_its_backend(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.main(["--backend", "echo", "--tokens-per-second", "50", "--name", "w", "--slots", "3"]) == 0
    settings, makers, _ = started[-1]
    assert (settings.name, settings.slots) == ("w", 3)
    assert makers[0]().options.tokens_per_second == 50
    assert (
        worker.main(["--model-names", "a", "--model-names", "b", "--and", "--backend", "echo", "--model-names", "c"])
        == 0
    )
    assert [make().options.model_names for make in started[-1][1]] == [("a", "b"), ("c",)]
    file = tmp_path / "w.toml"
    file.write_text('[worker]\nbackend = "transformers"\nmodel = "/models/x"\nmodel_names = ["x", "y"]\n')
    assert worker.main(["--config", str(file)]) == 0
    assert started[-1][1][0]().options.model_names == ("x", "y")
    monkeypatch.setenv("ZFABRIC_WORKER_BACKEND", "tests.integration.test_library:Reverser")
    assert worker.main([]) == 0
    assert type(started[-1][1][0]()).__name__ == "Reverser"


def test_the_general_endpoint_goes_before_the_file_and_after_the_special_one(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "some.toml"
    file.write_text('[controller]\nendpoint = ["tcp://127.0.0.1:1"]\n[worker]\nendpoint = "tcp://127.0.0.1:1"\n')
    monkeypatch.setenv("ZFABRIC_CONFIG", str(file))
    assert controller.main([]) == 0
    assert configuration(started).endpoints == (f"ipc://{tmp_path}/default.sock",)
    assert worker.main([]) == 0
    assert started[-1][0].endpoint == f"ipc://{tmp_path}/default.sock"
    monkeypatch.setenv("ZFABRIC_WORKER_ENDPOINT", "tcp://127.0.0.1:2")
    assert worker.main([]) == 0
    assert started[-1][0].endpoint == "tcp://127.0.0.1:2"
    monkeypatch.delenv("ZFABRIC_ENDPOINT")
    assert controller.main([]) == 0
    assert configuration(started).endpoints == ("tcp://127.0.0.1:1",)


def test_a_backend_may_parse_what_is_left(started: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "w.toml"
    file.write_text("[worker]\nslots = 3\ntensor_parallel = 4\n")
    backend = ("--backend", "tests.cli.backends:SelfParsing")
    assert worker.main([*backend, "--name", "w", "--size", "2", "--eager", "--x=1", "--config", str(file)]) == 0
    settings, (make,), _ = started[-1]
    assert (settings.name, settings.slots) == ("w", 3)
    assert (make().argv, make().settings) == (["--size", "2", "--eager", "--x=1"], {"tensor_parallel": 4})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "nonsense"], "neither one of"),
        (["--backend", "no.such.module:Class"], "cannot be imported"),
        (["--backend", "os:path"], "not a subclass"),
        (["--backend", "transformers"], "--model"),
        (["--slots", "0"], "slots is 0"),
        (["--stream-interval", "0"], "stream_interval is 0"),
        (["--speed", "inf"], "speed is inf"),
        (["--speed", "nan"], "speed is nan"),
        (["--speed=-1"], "speed is -1"),
        (["--speed", "1e300"], "speed is 1e+300"),
        (["--endpoint", "nowhere"], "not ipc://"),
        (["--and", "--name", "x"], "--name is a setting of the whole process"),
        (["--and", "--no-beats"], "--no-beats is a setting of the whole process"),
    ],
)
def test_wrong_worker_settings_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert worker.main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (controller.main, ["--policy", "--endpoint", "zfabric-controller --endpoint", "ZFABRIC_CONTROLLER_POLICY"]),
        (worker.main, ["--backend", "--tokens-per-second", "zfabric-worker --backend", "--stream-interval"]),
        (main.main, ["models", "workers", "status", "generate", "chat", "embed", "drain"]),
    ],
)
def test_help_has_flags_and_examples(command: Any, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in names:
        assert name in text


def test_help_of_a_later_backend_starts_nothing(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.main(["--and", "--backend", "echo", "--help"]) == 0
    assert "--tokens-per-second" in capsys.readouterr().out
    assert started == []


def test_nobody_there_is_said_with_a_hint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = {**(Client.__init__.__kwdefaults__ or {}), "connect_timeout_ms": 100}
    monkeypatch.setattr("zfabric.client.sync.Client.__init__.__kwdefaults__", defaults)
    assert main.main(["models", "--endpoint", f"ipc://{tmp_path}/n.sock"]) == 1
    text = capsys.readouterr().err
    assert "error 50304" in text
    assert "zfabric-controller" in text
