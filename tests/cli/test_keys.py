"""`zfabric keys`: what it makes, lists, rotates and removes, and that a keyring is never left broken."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from zfabric.cli import keyring_edits
from zfabric.cli.main import main
from zfabric.controller.keyring import KeyRing
from zfabric.core.controller.access import Role
from zfabric.transport.curve import load_public

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keyring_edits, "now", lambda: NOW)
    path = tmp_path / "keyring.toml"
    assert main(["keys", "make", "backend", "--keyring", str(path), "--role", "client"]) == 0
    assert main(["keys", "make", "gpu", "--keyring", str(path), "--role", "worker"]) == 0
    return path


def rows(ring: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    capsys.readouterr()
    assert main(["keys", "list", "--keyring", str(ring), "--json"]) == 0
    listed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return [(row["name"], row["state"], row["expires"]) for row in listed]


def test_keys_are_made_into_a_keyring(ring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(ring, capsys) == [("backend", "valid", ""), ("gpu", "valid", "")]
    loaded = KeyRing.load(ring)
    grant = loaded.grant(load_public(ring.parent / "gpu.key"))
    assert grant is not None
    assert grant.roles == {Role.WORKER}
    assert (ring.parent / "gpu.key_secret").stat().st_mode & 0o777 == 0o600
    assert main(["keys", "list", "--keyring", str(ring)]) == 0
    assert "backend" in capsys.readouterr().out


def test_a_rotation_has_an_overlap(ring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ring.write_text("# who is who\n" + ring.read_text())
    assert main(["keys", "rotate", "backend", "--keyring", str(ring), "--overlap-h", "2"]) == 0
    until = NOW + timedelta(hours=2)
    assert rows(ring, capsys) == [
        ("backend", "valid", ""), ("backend", "former", until.isoformat()), ("gpu", "valid", ""),
    ]  # fmt: skip
    assert ring.read_text().startswith("# who is who\n")
    loaded = KeyRing.load(ring)
    old, new = (load_public(ring.parent / name) for name in ("backend.key", "backend-2.key"))
    assert loaded.grant(old) == loaded.grant(new)
    at_end = until.timestamp()
    assert loaded.holds(old, at_end - 1)
    assert not loaded.holds(old, at_end)
    assert loaded.holds(new, at_end)


def test_a_former_key_that_is_still_good_is_not_dropped_unasked(ring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rotate = ["keys", "rotate", "backend", "--keyring", str(ring)]
    assert main(rotate) == 0
    before = ring.read_text()
    assert main(rotate) == 2
    assert "--former" in capsys.readouterr().err
    assert ring.read_text() == before
    assert main(["keys", "remove", "backend", "--former", "--keyring", str(ring)]) == 0
    assert main(rotate) == 0
    assert load_public(ring.parent / "backend-3.key") in KeyRing.load(ring).keys


def test_what_has_expired_is_shown_and_followed_by_the_next(
    ring: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate = ["keys", "rotate", "gpu", "--keyring", str(ring), "--overlap-h", "1"]
    assert main(rotate) == 0
    monkeypatch.setattr(keyring_edits, "now", lambda: NOW + timedelta(hours=1))
    assert ("gpu", "expired", (NOW + timedelta(hours=1)).isoformat()) in rows(ring, capsys)
    assert main(rotate) == 0


def test_a_key_is_removed(ring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "remove", "gpu", "--keyring", str(ring)]) == 0
    assert rows(ring, capsys) == [("backend", "valid", "")]
    assert (ring.parent / "gpu.key").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["remove", "nobody"], "has no [nobody]"),
        (["rotate", "nobody"], "has no [nobody]"),
        (["remove", "gpu", "--former"], "has no former key"),
        (["make", "gpu", "--role", "worker"], "gpu.key_secret exists"),
        (["make", "groups", "--role", "client"], "groups"),
        (["rotate", "gpu", "--overlap-h", "-1"], "overlap_h is -1"),
        (["make", "x"], "keyring and role go together"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    ring: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    before, files = ring.read_text(), sorted(ring.parent.iterdir())
    assert main(["keys", *arguments, "--keyring", str(ring)]) == 2
    assert reason in capsys.readouterr().err
    assert (ring.read_text(), sorted(ring.parent.iterdir())) == (before, files)


def test_the_last_key_stays(ring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "remove", "gpu", "--keyring", str(ring)]) == 0
    assert main(["keys", "remove", "backend", "--keyring", str(ring)]) == 2
    assert f"{ring} names no key" in capsys.readouterr().err


KEY = 'key = "gpu.key"\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'[a]\nrole = "client"\n{KEY}group = "g"', "there is no [groups.g]"),
        (f'[a]\nrole = "client"\n{KEY}group = "g"\ntokens_per_minute = 1\n[groups.g]', "belong into [groups.g]"),
        (f'[g]\nrole = "client"\n{KEY}[groups.g]', "is the name of a group too"),
        (f'[a]\nrole = "client"\n{KEY}requests_in_flight = 0', "requests_in_flight"),
        (f'[a]\nrole = "client"\n{KEY}requests_per_second = 0', "requests_per_second"),
        (f'[a]\nrole = "client"\n{KEY}priorities = [5, 1]', "the least comes first"),
        (f'[a]\nrole = "client"\n{KEY}priorities = [-1001, 1]', "priorities"),
        (f'[a]\nrole = "client"\n{KEY}workers = ["x"]', "workers is for the keys of workers"),
        (f'[a]\nrole = "client"\n{KEY}expires = 2027-01-01T00:00:00', "without its zone"),
        (f'[a]\nrole = "client"\n{KEY}expires = "soon"', "expires is no date"),
        (f'[a]\nrole = "client"\n{KEY}former = "backend.key"', "former and former_expires go together"),
        (f'groups = 3\n[a]\nrole = "client"\n{KEY}', "is no table of groups"),
    ],
)
def test_a_wrong_limit_names_its_place(ring: Path, text: str, reason: str) -> None:
    with pytest.raises(Exception, match=reason.replace("[", r"\[").replace("]", r"\]")):
        KeyRing.parse(text, ring)


def test_what_a_keyring_says_is_what_a_key_has(ring: Path) -> None:
    text = """
        [backend]
        role = "client"
        key = "backend.key"
        expires = 2027-01-01
        priorities = [-5, 5]
        prompt_bytes = 100
        group = "shop"
        [gpu]
        role = "client"
        key = "gpu.key"
        requests_in_flight = 3
        [groups.shop]
        requests_per_second = 2
        tokens_per_minute = 0.5
    """
    loaded = KeyRing.parse(text, ring)
    backend, gpu = (loaded.keys[load_public(ring.parent / f"{name}.key")] for name in ("backend", "gpu"))
    assert backend.expires_s == datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    assert (backend.grant.group, backend.grant.priorities, backend.grant.prompt_bytes) == ("shop", (-5, 5), 100)
    assert (backend.grant.limits.requests_per_second, backend.grant.limits.tokens_per_minute) == (2, 0.5)
    assert (gpu.grant.group, gpu.grant.priorities, gpu.grant.limits.requests_in_flight) == ("gpu", (0, 1_000), 3)
