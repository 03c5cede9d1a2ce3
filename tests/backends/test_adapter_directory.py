"""The directory of adapters that a worker offers: what is one, and that a name is never a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from zfabric.backends.front.adapter_directory import AdapterDirectory
from zfabric.errors import ConfigurationError, UnknownModelError
from zfabric.limits import WORKER_MODELS_MAX


def adapter(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


def test_each_subdirectory_with_settings_is_offered_but_not_by_the_models_own_name(tmp_path: Path) -> None:
    for name in ("red", "blue", "tiny"):
        adapter(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "README").write_text("")
    directory = AdapterDirectory(tmp_path, ("tiny",))
    assert directory.names() == ["blue", "red"]
    assert directory.path_of("red") == str(tmp_path / "red")
    adapter(tmp_path / "green")
    assert directory.names() == ["blue", "green", "red"]


@pytest.mark.parametrize("name", ["../outside", "red/../../outside", ".", "..", "", "notes", "red/", "RED\0"])
def test_a_name_that_is_no_entry_leads_nowhere(tmp_path: Path, name: str) -> None:
    adapter(tmp_path / "outside")
    adapter(tmp_path / "offered" / "red")
    with pytest.raises(UnknownModelError, match="offers no adapter"):
        AdapterDirectory(tmp_path / "offered").path_of(name)


def test_a_worker_without_a_directory_offers_nothing() -> None:
    directory = AdapterDirectory(None)
    assert directory.names() == []
    with pytest.raises(UnknownModelError):
        directory.path_of("red")


def test_a_directory_that_is_none_or_too_full_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no directory"):
        AdapterDirectory(tmp_path / "none")
    for number in range(WORKER_MODELS_MAX + 1):
        adapter(tmp_path / str(number))
    with pytest.raises(ConfigurationError, match=f"holds {WORKER_MODELS_MAX + 1} adapters"):
        AdapterDirectory(tmp_path)
