"""A step of the worker's two kinds of cache, as JSON: ``python -m bench.engines.transformers_steps [--models tiny smollm2]``.

Both engines' cores are stepped in turns by one thread, a step of one and a step of the other, each of so many streams that
began together: milliseconds of the processor per step, and the ratio of the two steps of each turn. So what others do on the
machine meets both. ``alike`` are streams of one length, which padded rows need no mask for; ``mixed`` ones differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.engines.transformers import PROMPT_TOKENS, request
from bench.engines.transformers_cache import KINDS, Kind, started, tell
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.scheduling.engine_core import EngineCore
from zfabric.backends.hf_transformers.worker import ModelWorker

STREAMS: Final = (1, 8, 32)
STEPS: Final = {"tiny": 300, "smollm2": 16}
#: Tokens by which the prompts of mixed streams differ.
MIXED: Final = {"alike": 0, "mixed": 3}


def begun(worker: ModelWorker, streams: int, longer: int, steps: int) -> EngineCore:
    """The core of a worker, whose own thread has nothing to do, with so many streams that all have their first token."""
    assert worker._assembled is not None
    engine = worker._assembled.engine
    core = engine._core
    for seed in range(streams):
        asked = request(f"{seed}", seed, PROMPT_TOKENS + longer * (seed % 16), steps + 8)
        core.accept(engine._input_processor.sequences(Answer(asked)))
    while core.running < streams or not all(one.output for one in core._sequences()):
        core.turn()
        core.take()
    return core


def compared(workers: dict[Kind, ModelWorker], streams: int, longer: int, steps: int) -> dict[str, Any]:
    """Steps of both in turns."""
    cores = {kind: begun(worker, streams, longer, steps) for kind, worker in workers.items()}
    taken: dict[Kind, list[int]] = {kind: [] for kind in cores}
    for number in range(steps):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            before = time.thread_time_ns()
            cores[kind].turn()
            taken[kind].append(time.thread_time_ns() - before)
            cores[kind].take()
    for core in cores.values():
        while core.busy:
            core.turn()
            core.take()
    ratios = sorted(padded / paged for padded, paged in zip(taken["padded"], taken["paged"], strict=True))
    return {
        **{f"{kind}_ms": round(statistics.median(found) / 1e6, 3) for kind, found in taken.items()},
        "padded_by_paged": [round(ratios[len(ratios) * quarter // 4], 3) for quarter in (1, 2, 3)],
    }


async def measure(name: str, directory: Path, given: argparse.Namespace) -> dict[str, Any]:
    """By streams, alike and mixed."""
    workers = {kind: (await started(directory, kind, given.dtype, max_batch_size=32))[0] for kind in KINDS}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for streams in STREAMS:
            for mix, longer in MIXED.items():
                print(f"{name}, {streams} streams, {mix}", file=sys.stderr, flush=True)
                found[f"{streams}_{mix}"] = compared(workers, streams, longer, STEPS[name])
    for worker in workers.values():
        await worker.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(STEPS), default=sorted(STEPS))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args(arguments)
    tell(given, measure)


if __name__ == "__main__":
    main()
