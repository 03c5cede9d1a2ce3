"""What large bodies leave is kept for the next ones, in the daemon that passes them on."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys

import pytest

from zfabric.cli import controller as daemon
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller

#: Pages that are new to the process when bodies come and go, the first ones not counted.
PROGRAM = """
import resource
from zfabric.transport.context import keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_memory()
for turn in range(22):
    if turn == 2:
        before = faults()
    bodies = [bytearray(1 << 20) for _ in range(4)]
    del bodies
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_bodies_that_come_and_go_take_no_new_pages() -> None:
    """Without it 20 times four bodies of 1 MiB take 20,000: what is free at the heap's end is given back each time."""
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    assert int(output) < 2_000


def test_the_controller_keeps_memory_and_a_program_that_embeds_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(daemon, "keep_memory", lambda: kept.append(True))
    monkeypatch.setattr(daemon, "own_the_process", lambda: None)
    settings = ControllerConfig(endpoints=("tcp://127.0.0.1:*",))

    async def embedded() -> None:
        async with Controller(settings):
            pass

    asyncio.run(embedded())
    assert kept == []

    async def served() -> None:
        monkeypatch.setattr(daemon, "on_signals", lambda drain: asyncio.get_running_loop().create_task(drain()))
        monkeypatch.setattr(daemon, "ready", lambda **fields: None)
        assert await daemon.serve(settings, "info", "json") == 0

    asyncio.run(served())
    assert kept == [True]
