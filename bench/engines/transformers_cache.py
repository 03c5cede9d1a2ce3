"""The worker's two kinds of cache in turns, as JSON: ``python -m bench.engines.transformers_cache [--models tiny smollm2]``.

- ``tokens_per_s``: of 8 and 32 streams that begin together.
- ``step_ms``, ``join_ms``, ``leave_ms``: a step of 32 rows of so many tokens each, and what is done beside it when a row of
  as many joins, or leaves, where the cache is full of what others left; and the longest of each.
- ``turns_ms``: time to the first token of a chat's first turn with a long history, and of a second that goes on from it.
- ``beside_a_long_one``: of 16 short requests beside one of 3,000 tokens, in a cache of 4,096, how many have tokens before the
  long one ends.
- ``gaps_ms``: between two tokens of four running streams, undisturbed and while prompts of 2,000 tokens arrive.

Greedy, ends ignored; medians of rounds in which the kinds take turns, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.engines.transformers import Timed, gaps, request, together
from tests.backends.tiny import save_llama
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.models.wheels import prepare
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

Kind = Literal["padded", "paged"]
Measure = Callable[[str, Path, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]
KINDS: Final[tuple[Kind, ...]] = ("padded", "paged")
STREAMS: Final = (8, 32)
ANSWER_TOKENS: Final = {"tiny": 128, "smollm2": 24}
ROUNDS: Final = {"tiny": 5, "smollm2": 2}
GAP_TOKENS: Final = {"tiny": 600, "smollm2": 64}
HISTORY_TOKENS: Final = 2_000
TURN_TOKENS: Final = 20
#: For the times of joining and leaving: rows of such a length, and tokens that each may still draw.
ROW_TOKENS: Final = {"tiny": (1_000, 600), "smollm2": (500, 100)}
ROWS: Final = 32
JOINS: Final = 8


async def started(directory: Path, kind: Kind, dtype: Any, **options: Any) -> tuple[ModelWorker, Timed]:
    """A worker with such a cache."""
    chosen = {"context_length": 4_096, "dtype": dtype, "device": "cpu", **options}
    worker = ModelWorker(TransformersOptions(model=str(directory), kv_cache=kind, **chosen))
    worker.steps = answers = Timed()
    await worker.load()
    return worker, answers


async def turns(worker: ModelWorker, answers: Timed, number: int) -> tuple[float, float]:
    """Milliseconds to the first token of a first turn and a second."""
    found = []
    tokens = request("", 1_000 + number, HISTORY_TOKENS, 1).prompt_token_ids or []
    for turn in ("first", "second"):
        name = f"{turn} {number}"
        sampling = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
        began = time.perf_counter()
        worker.begin(GenerateRequest(prompt_token_ids=tokens, request_id=name, sampling=sampling))
        await answers.until(name)
        found.append((time.perf_counter() - began) * 1_000)
        tokens = [*tokens, *answers.tokens(name), *(request("", number, TURN_TOKENS, 1).prompt_token_ids or [])]
    return found[0], found[1]


async def beside_a_long_one(directory: Path, kind: Kind, dtype: Any) -> int:
    """Short requests that have tokens before a long one beside them has its last."""
    worker, answers = await started(directory, kind, dtype, kv_tokens_max=4_096, max_batch_size=32)
    worker.begin(request("long", 1, 3_000, 24))
    await answers.until("long", tokens=1)
    names = [f"short {number}" for number in range(16)]
    for number, name in enumerate(names):
        worker.begin(request(name, number, 24, 4))
    await answers.until("long")
    running = sum(bool(answers.tokens(name)) for name in names)
    await answers.until(*names)
    await worker.close()
    return running


def _watched(call: Any, times: list[float]) -> Any:
    """The same, noting the milliseconds of each call."""

    def watched(*arguments: Any) -> Any:
        began = time.perf_counter()
        made = call(*arguments)
        times.append((time.perf_counter() - began) * 1_000)
        return made

    return watched


async def joining(directory: Path, kind: Kind, dtype: Any, columns: int, answer: int) -> dict[str, float]:
    """Milliseconds of a step of many rows, and of what is done besides when one joins and one leaves."""
    room = ROWS * (columns + answer)
    worker, answers = await started(directory, kind, dtype, max_batch_size=ROWS, kv_tokens_max=room)
    for number in range(room // columns + 1 if kind == "paged" else 0):
        worker.begin(request(f"left {number}", 10_000 + number, columns, 1))
        await answers.until(f"left {number}")
    names = [f"row {number}" for number in range(ROWS - 1)]
    assert worker._assembled is not None
    core: Any = worker._assembled.engine._core
    for seed, name in enumerate(names):
        worker.begin(request(name, seed, columns, answer))
    await answers.until(*names, tokens=2)
    moved: dict[str, list[float]] = {"join_ms": [], "leave_ms": []}
    _watch(core, moved)
    steps = []
    for number in range(JOINS):
        worker.begin(request(f"joins {number}", 1_000 + number, columns, 2))
        await answers.until(f"joins {number}")
        seen = len(answers.tokens(names[-1]))
        await answers.until(names[-1], tokens=seen + 2)
        steps.append(float(worker.load_report().gauges["step_ms"]))
    assert all(len(answers.tokens(name)) < answer for name in names), "rows ended before all had joined"
    # A padded row leaves in a call that most often finds none.
    moved = {name: sorted(found)[-JOINS:] for name, found in moved.items()}
    for name in names:
        worker.abort(name)
    await worker.close()
    medians = {name: statistics.median(found) for name, found in moved.items()}
    return {
        "step_ms": statistics.median(steps),
        **medians,
        **{f"{name}_max": max(found) for name, found in moved.items()},
    }


def _watch(core: Any, moved: dict[str, list[float]]) -> None:
    """Time what a core does when rows join and leave."""
    holder, names = (core._batch, ("join", "leave")) if hasattr(core, "_batch") else (core, ("_admitted", "_leave"))
    for name, times in zip(names, moved.values(), strict=True):
        setattr(holder, name, _watched(getattr(holder, name), times))


async def measure(name: str, directory: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Both kinds, in turns."""
    workers = {kind: await started(directory, kind, given.dtype, max_batch_size=32) for kind in KINDS}
    found: dict[Kind, dict[str, list[Any]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        await together(*workers[kind], 4, 8, -1)
    for number in range(ROUNDS[name]):
        for kind in KINDS:
            print(f"{name}, {kind}, round {number + 1}", file=sys.stderr, flush=True)
            its, (worker, answers) = found[kind], workers[kind]
            for streams in STREAMS:
                run = await together(worker, answers, ANSWER_TOKENS[name], streams, number)
                its.setdefault(f"tokens_per_s_{streams}", []).append(run.tokens_per_second)
            first, second = await turns(worker, answers, number)
            its.setdefault("first_turn_ms", []).append(first)
            its.setdefault("second_turn_ms", []).append(second)
    figures: dict[str, Any] = {}
    for kind in KINDS:
        print(f"{name}, {kind}, gaps, joining, a long one", file=sys.stderr, flush=True)
        worker, answers = workers[kind]
        figures[kind] = {key: round(statistics.median(values), 2) for key, values in found[kind].items()}
        figures[kind]["gaps_ms"] = await gaps(worker, answers, GAP_TOKENS[name])
        await worker.close()
        if not given.short:
            rows = await joining(directory, kind, given.dtype, *ROW_TOKENS[name])
            figures[kind] |= {key: round(value, 3) for key, value in rows.items()}
        figures[kind]["beside_a_long_one"] = await beside_a_long_one(directory, kind, given.dtype)
    return figures


def tell(given: argparse.Namespace, measure: Measure) -> None:
    """Measure each of the models that are asked for, and print all of it as JSON. Args: measure: Given its name and directory."""
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="zf-bench-") as root:
        directories = {
            "tiny": lambda: save_llama(Path(root), positions=4_096, heads=2),
            "smollm2": lambda: prepare("smollm2"),
        }
        results = {name: asyncio.run(measure(name, directories[name](), given)) for name in given.models}
    load = [round(one, 2) for one in os.getloadavg()]
    print(json.dumps({"dtype": given.dtype, "threads": given.threads, "load_average": load, **results}, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(ROUNDS), default=sorted(ROUNDS))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--short", action="store_true", help="without the times of joining and leaving")
    given = parser.parse_args(arguments)
    tell(given, measure)


if __name__ == "__main__":
    main()
