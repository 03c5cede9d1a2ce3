"""Every door against inputs that a seed has changed: the short form of `make fuzz`."""

from __future__ import annotations

import pytest

from tests.fuzz import doors, edges, handshakes, recordings
from tests.fuzz.mutations import mutated
from tests.fuzz.script import Step, read, written
from tests.fuzz.targets import TARGETS, run
from zfabric.wire import codec, kinds

#: Inputs of each target. Those that run a whole session cost a hundred times what a decoder does.
COUNTS = {
    "controller": 400, "client": 800, "worker": 1_000, "upstream": 2_000, "zmtp-keyed": 500, "recording": 500,
    "gateway": 2_000,
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_a_door_stands(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    for data in (b"", *seeds, *mutated(seeds, seed=1, count=COUNTS.get(name, 4_000))):
        error = run(target, data)
        assert error is None, data.hex()


def test_seeds_are_what_their_doors_take() -> None:
    """A change of the protocol that made them useless would leave little to find."""
    for header in recordings.messages():
        if header[0] == kinds.CHUNKS:
            codec.unpack_chunks(header)
        elif header[0] in kinds.WITH_BODY:
            codec.unpack_envelope(header)
        elif len(header) > 1:
            codec.unpack_control(header)
    for data in recordings.requests():
        codec.unpack_request(doors.OPERATIONS[data[0]], data[1:]).validate()
    assert {data[0] for data in recordings.requests()} == set(range(len(doors.OPERATIONS)))
    assert {data[0] for data in recordings.bodies()} == set(range(len(edges.PATHS)))
    assert {data[0] for data in recordings.answers()} == set(range(len(edges.CALLS)))


def test_handshakes_of_seeds_come_to_their_end() -> None:
    """Whose words are no more than refused finds nothing that lies behind."""
    one, other = handshakes.server(), handshakes.client()
    handshakes.introduce(one, other, steps=7)
    assert one.ready
    assert other.ready


def test_any_bytes_are_a_script() -> None:
    steps = [Step(3, b"abc", b""), Step(255, b"", b"x" * 300)]
    assert list(read(written(steps))) == steps
    assert list(read(b"\x01\xff\xffabc")) == [Step(1, b"abc", b"")]
    assert list(read(b"")) == []


def test_a_fault_behind_a_door_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes out that is no typed error is a finding."""
    monkeypatch.setattr("zfabric.wire.codec.subject_of", lambda _: 1 // 0)
    seeds = list(TARGETS["wire"].seeds())
    assert isinstance(run(TARGETS["wire"], seeds[0]), ZeroDivisionError)
