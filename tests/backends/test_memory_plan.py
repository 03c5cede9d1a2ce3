"""Models on one device plan what the others do not: with a device whose memory is a number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zfabric.backends.hf_transformers.loading.memory_plan import SHARE, plan
from zfabric.errors import ConfigurationError

GIB = 2**30
#: Another process that plans, says so, and lives until its input ends.
OTHER = """
import sys
from pathlib import Path
from zfabric.backends.hf_transformers.loading.memory_plan import plan
made = plan("gpu", "other", lambda: 100 * 2**30, least=1, directory=Path(sys.argv[1]))
print(made.bytes, flush=True)
sys.stdin.read()
"""


def test_the_second_model_plans_what_the_first_does_not(tmp_path: Path) -> None:
    free = [100 * GIB]
    first = plan("gpu", "first", lambda: free[0], least=GIB, directory=tmp_path)
    assert first.bytes == int(100 * GIB * SHARE)
    free[0] -= 5 * GIB  # the second model's weights
    second = plan("gpu", "second", lambda: free[0], least=GIB, directory=tmp_path)
    assert second.bytes == int((95 * GIB - first.bytes) * SHARE)
    assert first.bytes + second.bytes < free[0]
    free[0] = 96 * GIB
    # Another device is another matter.
    third = plan("gpu 2", "third", lambda: 100 * GIB, least=GIB, directory=tmp_path)
    assert third.bytes == first.bytes
    third.release()
    second.release()
    first.release()
    first.release()
    again = plan("gpu", "again", lambda: 100 * GIB, least=GIB, directory=tmp_path)
    assert again.bytes == int(100 * GIB * SHARE)
    again.release()


def test_a_model_that_finds_too_little_names_who_has_it(tmp_path: Path) -> None:
    first = plan("gpu", "first", lambda: 10 * GIB, least=GIB, directory=tmp_path)
    with pytest.raises(ConfigurationError, match=r"'second': device gpu has 0.50 GiB free .* first \(8.00 GiB\)"):
        plan("gpu", "second", lambda: int(8.5 * GIB), least=GIB, directory=tmp_path)
    # What an operator wants is his own matter, and known to those who come after.
    wanted = plan("gpu", "third", lambda: 0, least=GIB, wanted=3 * GIB, directory=tmp_path)
    assert wanted.bytes == 3 * GIB
    with pytest.raises(ConfigurationError, match=r"first \(8.00 GiB\), third \(3.00 GiB\)"):
        plan("gpu", "fourth", lambda: 11 * GIB, least=GIB, directory=tmp_path)
    first.release()
    wanted.release()


def test_a_device_of_ones_own_is_used_however_little_it_has(tmp_path: Path) -> None:
    only = plan("gpu", "only", lambda: 100, least=GIB, directory=tmp_path)
    assert only.bytes == 80
    only.release()


def test_plans_of_other_processes_count_and_end_with_them(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    planned = int(other.stdout.readline())
    assert planned == int(100 * GIB * SHARE)
    mine = plan("gpu", "mine", lambda: 100 * GIB, least=GIB, directory=tmp_path)
    assert mine.bytes == int((100 * GIB - planned) * SHARE)
    mine.release()
    other.kill()
    other.communicate()
    # It could not clean up after itself.
    assert len(list((tmp_path / "gpu").glob("*.plan"))) == 1
    again = plan("gpu", "mine", lambda: 100 * GIB, least=GIB, directory=tmp_path)
    assert again.bytes == planned
    again.release()
    assert not list((tmp_path / "gpu").glob("*.plan"))


def test_a_place_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="set TMPDIR"):
        plan("gpu", "m", lambda: GIB, least=1, directory=tmp_path / "file")
