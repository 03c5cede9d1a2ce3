"""Which paths operators may name weights by, and weights that come in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.backends.front.weight_files import INDEX, ONE_FILE, WeightsDirectory
from zfabric.backends.front.weight_transfer import WeightTransfer
from zfabric.errors import ConfigurationError, RequestError, UnsupportedOperationError


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_path_is_a_file_or_a_directory_below(tmp_path: Path) -> None:
    root = tmp_path / "weights"
    one = touch(root / "a" / ONE_FILE)
    touch(root / "a" / "tokenizer.json")
    config = touch(root / "a" / "config.json")
    for path in ("a", "./a/", str(root / "a"), "b/../a"):
        (root / "b").mkdir(exist_ok=True)
        found = WeightsDirectory(root).find(path)
        assert (found.files, found.config) == ({ONE_FILE: one}, config)
    other = touch(root / "step.safetensors")
    found = WeightsDirectory(root).find("step.safetensors")
    assert (found.files, found.config) == ({ONE_FILE: other}, None)
    with found.as_directory() as directory:
        assert [entry.name for entry in directory.iterdir()] == [ONE_FILE]
        assert (directory / ONE_FILE).samefile(other)
    assert not directory.exists()


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    names = ["m-1.safetensors", "m-2.safetensors"]
    for name in names:
        touch(tmp_path / name)
    index = touch(tmp_path / INDEX, json.dumps({"weight_map": dict(zip("abc", [*names, names[0]], strict=True))}))
    found = WeightsDirectory(tmp_path).find(".")
    assert found.files == {INDEX: index, **{name: tmp_path / name for name in names}}
    assert found.tensor_files == [tmp_path / name for name in names]


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/m.safetensors", "x/m.safetensors", "m.bin", ""])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "a" / INDEX, json.dumps({"weight_map": {"a": name}}))
    touch(tmp_path / "m.safetensors")
    with pytest.raises(RequestError, match="which is no file in it"):
        WeightsDirectory(tmp_path).find("a")


def test_nothing_outside_of_the_directory_is_read(tmp_path: Path) -> None:
    root = tmp_path / "weights"
    outside = touch(tmp_path / "outside" / ONE_FILE)
    root.mkdir()
    (root / "link").symlink_to(outside.parent)
    (root / "file.safetensors").symlink_to(outside)
    (root / "inner").mkdir()
    (root / "inner" / ONE_FILE).symlink_to(outside)
    directory = WeightsDirectory(root)
    for path in ("../outside", str(outside), str(outside.parent), "link", "file.safetensors", "inner", ".."):
        with pytest.raises(RequestError, match="leads out of the directory of weights"):
            directory.find(path)
    for path, reason in (("no", "cannot be read"), ("a\0b", "cannot be read"), (".", "cannot be read.*index.json")):
        with pytest.raises(RequestError, match=reason):
            directory.find(path)
    touch(root / "weights.bin")
    with pytest.raises(RequestError, match="no file of safetensors"):
        directory.find("weights.bin")
    touch(root / "broken" / INDEX, "[]")
    with pytest.raises(RequestError, match="holds neither"):
        directory.find("broken")
    with pytest.raises(UnsupportedOperationError, match="without --weights-dir"):
        WeightsDirectory(None).find(".")
    with pytest.raises(ConfigurationError, match="is no directory"):
        WeightsDirectory(tmp_path / "no")


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=8), st.data())
def test_parts_make_the_file(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    transfer = WeightTransfer(size_max=len(whole))
    number = transfer.start(len(whole))
    at = 0
    for part in parts:
        wrong = data.draw(st.integers(0, len(whole)))
        if wrong != at:
            with pytest.raises(RequestError, match=f"{at} of {len(whole)} are there"):
                transfer.add(number, wrong, part)
        with pytest.raises(RequestError, match="not whole"):
            transfer.whole(number)
        at += len(part)
        assert transfer.add(number, at - len(part), part) == at
    with pytest.raises(RequestError, match="are there"):
        transfer.add(number, at, b"x")
    path = transfer.whole(number)
    assert path.read_bytes() == whole
    assert path.stat().st_mode & 0o77 == 0
    with pytest.raises(RequestError, match="weights of this model have 1 …"):
        transfer.start(len(whole) + 1)
    assert transfer.start(1) != number
    assert not path.exists()
    with pytest.raises(RequestError, match=f"update {number} is not under way"):
        transfer.whole(number)
    transfer.drop()
