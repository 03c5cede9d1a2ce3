"""Recordings: whatever is written and wherever a file breaks off, what is read is what was written, and bounds hold."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric import limits
from zfabric.core.recorder import FIELDS, Recorded
from zfabric.errors import ConfigurationError
from zfabric.recording import ring
from zfabric.recording.arrivals import requests_of
from zfabric.recording.config import RecordingConfig
from zfabric.recording.reader import Event, read_recordings
from zfabric.recording.ring import Ring
from zfabric.recording.timeline import Filter

SIZE = limits.RECORD_BYTES_MIN
VALUES = st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=40) | st.booleans()
NAMED = st.dictionaries(st.text(max_size=4), VALUES | st.lists(VALUES, max_size=3), max_size=3)
TURNS = st.lists(st.lists(st.tuples(st.text(max_size=4), NAMED), min_size=1, max_size=3), max_size=5)
Told = list[tuple[int, str, dict[str, object]]]
Turn = list[tuple[str, dict[str, object]]]


class Clock:
    """Nanoseconds that a test moves."""

    def __init__(self) -> None:
        self.now_ns = 1_000

    def __call__(self) -> int:
        return self.now_ns

    def unix_ns(self) -> int:
        return 10**18 + self.now_ns


def opened(
    file: Path, clock: Clock, *, ms_max: int = limits.RECORD_MS_MAX, state: list[Recorded] | None = None
) -> Ring:
    config = RecordingConfig(file=file, bytes_max=SIZE, ms_max=ms_max)
    return Ring(
        config,
        of="controller",
        build="b",
        fields=FIELDS,
        clock=clock,
        wall_clock=clock.unix_ns,
        state=lambda _: state or [],
    )


def told(file: Path) -> Told:
    return [(event.unix_ns - 10**18, event.name, event.fields) for event in read_recordings([file]).events]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def turns_of(turns: list[Turn], clock: Clock) -> Iterator[list[Recorded]]:
    for turn in turns:
        entries = []
        for name, fields in turn:
            clock.now_ns += 7
            entries.append(Recorded(clock.now_ns, name, fields))
        yield entries


@settings(max_examples=60, deadline=None)
@given(turns=TURNS, crashed=st.booleans())
def test_what_is_read_is_what_was_written(turns: list[Turn], crashed: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        clock, file, written = Clock(), Path(directory) / "r", []
        kept = opened(file, clock)
        for entries in turns_of(turns, clock):
            kept.write(entries)
            written += [(entry.at_ns, entry.event, entry.values) for entry in entries]
        if not crashed:
            kept.close()
            assert file.stat().st_size < SIZE // limits.RECORD_PARTS or not turns
        assert told(file) == written
        kept.close()


@settings(max_examples=60, deadline=None)
@given(turns=TURNS, data=st.data())
def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(turns: list[Turn], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        clock, file, written = Clock(), Path(directory) / "r", []
        kept = opened(file, clock)
        for entries in turns_of(turns, clock):
            kept.write(entries)
            written.append(entries)
        kept.close()
        whole = file.read_bytes()
        head = 1 + ring.LENGTH_BYTES + int.from_bytes(whole[1 : 1 + ring.LENGTH_BYTES])
        cut = data.draw(st.integers(0, len(whole)))
        file.write_bytes(whole[:cut])
        if cut < head:
            with pytest.raises(ConfigurationError, match="no recording"):
                read_recordings([file])
            return
        found, expected = told(file), list[object]()
        for entries in written:
            if len(found) < len(expected) + len(entries):
                break
            expected += [(entry.at_ns, entry.event, entry.values) for entry in entries]
        assert found == expected


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(max_size=200), at=st.integers(0, 400))
def test_damaged_bytes_raise_nothing_but_what_they_are_told_to(junk: bytes, at: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        clock, file = Clock(), Path(directory) / "r"
        kept = opened(file, clock)
        for number in range(10):
            kept.write([Recorded(clock.now_ns, "event", {"number": number})])
        kept.close()
        data = file.read_bytes()
        file.write_bytes(data[:at] + junk + data[at + len(junk) :])
        try:
            read_recordings([file])
        except ConfigurationError as error:
            assert "no recording" in error.message


@pytest.mark.parametrize("key", [[1, "2", 3], [1, 2, None], [1, 2], "123", {"a": 1}])
def test_what_is_no_request_has_no_name(key: object) -> None:
    event = Event(1, "controller", "ended", {"request": key})
    assert (event.request, event.attempt) == ("", 0)


def test_names_of_models_are_texts() -> None:
    event = Event(1, "controller", "worker_there", {"models": [["m"], 3, "m"], "gained": 7})
    assert list(Filter(model="m").of([event])) == [Event(1, "controller", "worker_there", event.fields)]


@pytest.mark.parametrize("name", ["client", "operation", "model", "priority", "bytes"])
@pytest.mark.parametrize("value", [None, [], 1.5])
def test_values_of_a_submission_are_what_they_are_said_to_be(name: str, value: object) -> None:
    """A recording that no controller wrote is refused, and by the name of what is wrong with it."""
    fields = {
        "request": [1, 2, 0], "client": "c", "operation": "generate", "model": "m", "priority": 0, "deadline_ms": None,
        "bytes": 1,
    }  # fmt: skip
    assert requests_of([Event(1, "controller", "submitted", dict(fields))])[0].client == "c"
    with pytest.raises(ConfigurationError, match=name):
        requests_of([Event(1, "controller", "submitted", fields | {name: value})])


def test_it_takes_no_more_than_it_may_and_keeps_the_newest(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "r"
    state = [Recorded(0, "config", ({"policy": "p"},))]
    kept = opened(file, clock, state=state)
    for number in range(6_000):
        clock.now_ns += 1_000
        kept.write([Recorded(clock.now_ns, "event", {"number": number, "pad": "x" * 100})])
    assert sum(part.stat().st_size for part in tmp_path.iterdir()) <= SIZE
    assert len(list(tmp_path.iterdir())) == limits.RECORD_PARTS
    kept.close()
    numbers = [fields["number"] for _, name, fields in told(file) if name == "event"]
    assert numbers == list(range(int(str(numbers[0])), 6_000))
    assert len(numbers) * 120 > SIZE // 2
    assert [name for _, name, _ in told(file)].count("config") == limits.RECORD_PARTS


def test_it_goes_back_no_further_than_it_may(tmp_path: Path, clock: Clock) -> None:
    file, second = tmp_path / "r", 1_000_000_000
    kept = opened(file, clock, ms_max=4_000)
    for number in range(20):
        clock.now_ns += second
        kept.write([Recorded(clock.now_ns, "event", {"number": number})])
    assert [fields["number"] for _, _, fields in told(file)] == [16, 17, 18, 19]
    clock.now_ns += 3_600 * second
    kept.write([Recorded(clock.now_ns, "event", {"number": 20})])
    assert [fields["number"] for _, _, fields in told(file)] == [20]
    kept.close()


def test_a_turn_that_no_part_holds_is_counted(tmp_path: Path, clock: Clock) -> None:
    kept = opened(tmp_path / "r", clock)
    kept.write([Recorded(clock.now_ns, "event", {"text": "x" * SIZE})])
    kept.close()
    assert [name for _, name, _ in told(tmp_path / "r")] == ["left_out"]


def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[OSError] = []
    config = RecordingConfig(file=tmp_path / "r", bytes_max=SIZE, ms_max=4_000)
    kept = Ring(
        config, of="worker", build="", fields=FIELDS, clock=clock, wall_clock=clock.unix_ns, on_failure=failures.append
    )

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    clock.now_ns += 10**10
    kept.write([Recorded(clock.now_ns, "event", {})])
    kept.write([Recorded(clock.now_ns, "event", {})])
    assert [failure.errno for failure in failures] == [28]
    kept.close()


def test_where_nothing_can_be_recorded_is_said_at_once(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ConfigurationError, match="cannot be recorded to"):
        opened(tmp_path / "nowhere" / "r", clock)
    with pytest.raises(ConfigurationError, match="record_bytes_max is 5"):
        RecordingConfig(file=tmp_path / "r", bytes_max=5)
    with pytest.raises(ConfigurationError, match="does not exist"):
        read_recordings([tmp_path / "nothing"])
