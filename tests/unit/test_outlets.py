"""What is collected goes to whoever takes it, once, and a taker that fails costs the others nothing."""

from __future__ import annotations

from zfabric.core.outlets import Outlets
from zfabric.core.recorder import Recorder


def test_each_has_what_came_since_and_a_fault_is_told() -> None:
    faults: list[Exception] = []
    kept: list[str] = []
    broken, sound = Recorder(lambda: 1), Recorder(lambda: 1)
    outlets = Outlets(faults.append)
    outlets.add(broken, lambda _: 1 // 0)
    outlets.add(sound, lambda entries: kept.extend(entry.event for entry in entries))
    outlets.pass_on()
    assert (faults, kept) == ([], [])
    for recorder in (broken, sound):
        recorder.record("load", ())
    outlets.pass_on()
    outlets.pass_on()
    assert [type(fault) for fault in faults] == [ZeroDivisionError]
    assert kept == ["load"]
