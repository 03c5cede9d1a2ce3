"""Models on one device plan what the others do not: with a device whose memory is a number."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.backends.test_engine import starting
from tests.backends.tiny import ask
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
sys.stdin.readline()
made.took(made.bytes // 4)
print("taken", flush=True)
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


def test_what_is_taken_of_a_plan_is_promised_no_more(tmp_path: Path) -> None:
    free = [100 * GIB]
    first = plan("gpu", "first", lambda: free[0], least=GIB, directory=tmp_path)
    sizes: list[int] = []
    for part in (0, first.bytes // 2, first.bytes // 3, first.bytes, 2 * first.bytes):
        first.took(part)
        # The device says less by what is there: the most so far, since what is given back stays with the process.
        taken = min(max(part, first.bytes // 2 if sizes[1:] else 0), first.bytes)
        free[0] = 100 * GIB - taken
        second = plan("gpu", "second", lambda: free[0], least=GIB, directory=tmp_path)
        sizes.append(second.bytes)
        second.release()
    assert sizes == [int(20 * GIB * SHARE)] * 5
    with pytest.raises(ConfigurationError, match=r"0.50 GiB free .* first \(80.00 GiB, 80.00 GiB of it taken\)"):
        plan("gpu", "second", lambda: GIB // 2, least=GIB, directory=tmp_path)
    first.release()
    first.took(1)


def test_a_model_that_finds_too_little_names_who_has_it(tmp_path: Path) -> None:
    first = plan("gpu", "first", lambda: 10 * GIB, least=GIB, directory=tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"'second': device gpu has 0.50 GiB free .* first \(8.00 GiB, 0.00 GiB of it taken\)"
    ):
        plan("gpu", "second", lambda: int(8.5 * GIB), least=GIB, directory=tmp_path)
    # What an operator wants is his own matter, and known to those who come after.
    wanted = plan("gpu", "third", lambda: 0, least=GIB, wanted=3 * GIB, directory=tmp_path)
    assert wanted.bytes == 3 * GIB
    with pytest.raises(ConfigurationError, match=r"first \(8.00 GiB, .*\), third \(3.00 GiB, .*\)"):
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
    # What it has taken is not free any more, and is not subtracted twice.
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "taken\n"
    taken = planned // 4
    mine = plan("gpu", "mine", lambda: 100 * GIB - taken, least=GIB, directory=tmp_path)
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


@pytest.mark.parametrize("kv_cache", ["paged", "padded"])
async def test_a_worker_says_what_its_cache_has_taken(kv_cache: str, tiny_llama: Path, tmp_path: Path) -> None:
    async with starting(tiny_llama, kv_cache) as start:
        worker, answers = await start(kv_tokens_max=400)
        assembled = worker._assembled
        assert assembled is not None
        memory = plan("gpu", "tiny", lambda: 100 * GIB, least=GIB, wanted=4_000, directory=tmp_path)
        room = assembled.loaded.room._replace(memory=memory)
        worker._assembled = replace(assembled, loaded=replace(assembled.loaded, room=room))
        engine, looked = assembled.engine, threading.Event()

        def promised() -> int:
            worker.load_report()
            (file,) = (tmp_path / "gpu").glob("*.plan")
            planned, taken, _ = file.read_text().split()
            return int(planned) - int(taken)

        def look() -> None:
            """Between two turns, until the answer has grown."""
            if engine.kv_tokens_held < 30:
                engine.run_job(look)
            else:
                worker.load_report()
                looked.set()

        # Pages have their memory from the start on, padded rows as they come.
        assert promised() == (0 if kv_cache == "paged" else 4_000)
        worker.begin(ask("long", "Hello", max_new_tokens=60, ignore_eos=True))
        engine.run_job(look)
        await answers.until("long")
        assert looked.wait(60)
        # What was taken is not given back.
        assert promised() <= (0 if kv_cache == "paged" else 3_700)


def test_a_place_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="set TMPDIR"):
        plan("gpu", "m", lambda: GIB, least=1, directory=tmp_path / "file")
