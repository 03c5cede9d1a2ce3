"""`zfabric check`: a settings file as all programs would read it, all of its faults at once, and nothing started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zfabric.cli.check import check_file
from zfabric.cli.main import main
from zfabric.transport.curve import create_keys


def faults(path: Path, text: str) -> dict[str, str]:
    """What is wrong with a file of this text, by where it is."""
    path.write_text(text)
    found = check_file(path)
    assert all(finding.advice or finding.level != "error" or finding.what for finding in found)
    return {finding.of: f"{finding.what} {finding.advice}" for finding in found if finding.level == "error"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "zfabric.toml"


def test_a_file_for_a_whole_host_is_fine(file: Path, tmp_path: Path) -> None:
    for name in ("controller", "backend-1"):
        create_keys(tmp_path, name)
    (tmp_path / "keyring.toml").write_text('[backend-1]\nrole = "client"\nkey = "backend-1.key"\n')
    text = f"""
        [controller]
        endpoint = ["ipc:///run/zfabric/c.sock", "tcp://127.0.0.1:9000"]
        policy = "power_of_two"
        key = "{tmp_path}/controller.key_secret"
        keyring = "{tmp_path}/keyring.toml"
        [worker]
        backend = "echo"
        tokens_per_second = 5
        slots = 3
        [gateway]
        port = 8000
        [client]
        endpoint = "tcp://127.0.0.1:9000"
        max_new_tokens = 16
        json = true
    """
    assert faults(file, text) == {}
    assert [finding.of for finding in check_file(file)] == ["[controller]", "[worker]", "[gateway]", "[client]"]


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("[controler]\na = 1", "[controler]", "did you mean [controller]?"),
        ("[controller]\npolcy = 'lottery'", "[controller] polcy", "did you mean policy?"),
        ("[controller]\nbeat_ms = 'fast'", "[controller] beat_ms", "int"),
        ("[controller]\npolicy = 'best'", "[controller]", "is not one of"),
        ("[controller]\nqueue_depth_max = 0", "[controller] queue_depth_max", "at least 1"),
        ("[controller]\nlease_ms = 1", "[controller]", "at least twice beat_ms"),
        ("[controller]\nendpoint = ['tcp://0.0.0.0:9000']", "[controller]", "set public"),
        ("[controller]\nendpoint = ['http://x']", "[controller]", "http://x"),
        ("[worker]\nbackend = 'echo'\ntoknes_per_second = 3", "[worker] toknes_per_second", "tokens_per_second"),
        ("[worker]\nslots = 'many'", "[worker] slots", "int"),
        ("[worker]\nendpoint = 'tcp://host'", "[worker]", "tcp://host"),
        ("[worker]\nbackend = 'nope'", "[worker]", "nope"),
        ("[gateway]\nport = 'x'", "[gateway] port", "int"),
        ("[gateway]\nworkers = 0", "[gateway] workers", "at least 1"),
        ("[client]\nmax_tokens = 3", "[client] max_tokens", "max_new_tokens"),
        ("[client]\nmax_new_tokens = 'x'", "[client] max_new_tokens", "int"),
        ("[client]\nendpoint = 'tcp://host'", "[client] endpoint", "no port"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(file: Path, text: str, where: str, says: str) -> None:
    found = faults(file, text)
    assert list(found) == [where]
    assert says in found[where]


def test_all_faults_are_told_at_once(file: Path) -> None:
    text = """
        [controler]
        [controller]
        polcy = "lottery"
        beat_ms = "fast"
        stall_ms = "slow"
        [client]
        jsn = true
    """
    assert set(faults(file, text)) == {
        "[controler]", "[controller] polcy", "[controller] beat_ms", "[controller] stall_ms", "[client] jsn",
    }  # fmt: skip


def test_key_files_are_read_and_their_permissions_looked_at(file: Path, tmp_path: Path) -> None:
    for name in ("controller", "gpu"):
        create_keys(tmp_path, name)
    (tmp_path / "keyring.toml").write_text('[gpu]\nrole = "king"\nkey = "gpu.key"\n')
    (tmp_path / "gpu.key_secret").chmod(0o644)
    text = f"""
        [controller]
        key = "{tmp_path}/controller.key_secret"
        keyring = "{tmp_path}/keyring.toml"
        [worker]
        key = "{tmp_path}/gpu.key_secret"
        controller_key = "{tmp_path}/missing.key"
    """
    found = faults(file, text)
    assert "king" in found["[controller] keyring"]
    assert "chmod 0600" in found["[worker] key"]
    assert "zfabric keys" in found["[worker] controller_key"]


def test_what_is_no_toml_is_one_fault(file: Path) -> None:
    assert list(faults(file, "a = [")) == [str(file)]
    assert list(faults(file, "")) == []


def test_the_exit_code_tells(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("[controller]\npolicy = 'lottery'\n")
    assert main(["check", str(file)]) == 0
    file.write_text("[controller]\npolcy = 'lottery'\n")
    capsys.readouterr()
    assert main(["check", str(file), "--json"]) == 2
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["level"], finding["of"]) == ("error", "[controller] polcy")
    assert main(["check", str(file.with_name("missing.toml"))]) == 2
