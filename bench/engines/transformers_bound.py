"""Steps of the worker against what its memory allows: how fast weights and cache can be read at all, and the host's share.

The core is stepped by the engine's own thread, as many streams at once as asked for, and nothing else is done meanwhile:

- ``tokens_per_s`` and ``step_ms``: of whole turns, draws included, by the clock.
- ``bound_ms``: bytes of weights and of the rows' keys and values, by the bandwidth of a copy in the same run. No step that reads
  them from memory takes less.
- ``step_by_bound``: how many times as long it takes.
- ``host_share``: part of a turn in which no pass of the model runs on the device, by its events. Of a pass that is launched
  kernel by kernel, waits between kernels are not seen, so it says most of recorded steps. None on a CPU, its own host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner
from zfabric.backends.hf_transformers.scheduling.engine import Engine
from zfabric.backends.hf_transformers.scheduling.paged_core import PagedCore
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

STREAMS: Final = {"cpu": (1, 8), "cuda": (1, 8, 64, 256)}
PROMPT_TOKENS: Final = 24
#: Larger than any cache of a processor, by device.
_COPIED_BYTES: Final = {"cpu": 1 << 28, "cuda": 1 << 31}
_COPIES: Final = 5
#: Steps that are not counted: the first ones begin the streams.
_WARM_UPS: Final = 3


class Passes:
    """Times the passes of a runner on its device, by events; nothing on a CPU."""

    def __init__(self, runner: PagedRunner) -> None:
        self._runner, self._forward = runner, runner.forward
        self._events: list[tuple[Any, Any]] = []
        self._timed = runner.model.device.type == "cuda"

    def __enter__(self) -> Passes:
        if self._timed:
            self._runner.forward = self._noted  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        if self._timed:
            del self._runner.forward

    def _noted(self, *given: Any) -> torch.Tensor:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        found = self._forward(*given)
        end.record()
        self._events.append((begin, end))
        return found

    def seconds(self) -> float | None:
        """Of all passes; None on a CPU."""
        if not self._timed:
            return None
        torch.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._events)) / 1_000


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy within the device's memory reads and writes."""
    source = torch.ones(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken: list[float] = []
    for _ in range(_COPIES):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        taken.append(time.perf_counter() - began)
    copied: int = source.numel()
    return 2 * copied / min(taken)


def weight_bytes(model: Any) -> int:
    """What a step reads of a model: all weights, but of an embedding that is no head as well only some rows."""
    looked_up = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is looked_up
    seen = {id(one): one for one in model.parameters() if tied or one is not looked_up}
    return sum(one.numel() * one.element_size() for one in seen.values())


def against_bound(
    step_s: Sequence[float], streams: int, read_bytes: float, bytes_per_s: float, device_s: float | None
) -> dict[str, Any]:
    """The figures of so many steps.

    Args:
        step_s: Seconds of each turn.
        read_bytes: What a step reads in the mean.
        device_s: Seconds of all passes on the device; None on a CPU.
    """
    median, bound = statistics.median(step_s), read_bytes / bytes_per_s
    return {
        "tokens_per_s": round(streams / median, 1),
        "step_ms": round(median * 1_000, 3),
        "bound_ms": round(bound * 1_000, 4),
        "step_by_bound": round(median / bound, 2),
        "host_share": None if device_s is None else round(max(0.0, 1 - device_s / sum(step_s)), 3),
    }


def measure(engine: Engine, model: Any, steps: int, streams: Sequence[int] = ()) -> dict[str, Any]:
    """By streams. Nothing else may be asked of the engine meanwhile."""
    core = engine._core
    if not isinstance(core, PagedCore):
        return {"failed": "the model's rows are padded"}
    device = model.device
    speed = bandwidth(device)
    found: dict[str, Any] = {
        "bandwidth_gb_per_s": round(speed / 1e9, 1),
        "weights_mb": round(weight_bytes(model) / 1e6, 3),
    }
    for number in streams or STREAMS[device.type]:
        if number > core._batch_size_max:
            continue
        job = engine.run_job(partial(_stepped, engine, core, model, number, steps, speed))
        found[f"{number}_streams"] = job.result()
    return found


def _stepped(engine: Engine, core: PagedCore, model: Any, streams: int, steps: int, speed: float) -> dict[str, Any]:
    """On the engine's thread: streams that begin together, and so many of their steps."""
    for seed in range(streams):
        sampling = SamplingParams(temperature=0, max_new_tokens=_WARM_UPS + steps + 8, ignore_eos=True)
        tokens = [10 + (seed * 7 + place * 3) % 200 for place in range(PROMPT_TOKENS)]
        asked = GenerateRequest(prompt_token_ids=tokens, request_id=f"bound {streams} {seed}", sampling=sampling)
        core.accept(engine._input_processor.sequences(Answer(asked)))
    while core.running < streams or not all(row.begun for row in core._rows):
        core.turn()
        core.take()
    for _ in range(_WARM_UPS):
        core.turn()
        core.take()
    taken, kept = [], 0
    with Passes(core._runner) as passes:
        for _ in range(steps):
            kept += sum(core._runner.cache.step_bytes(row.done + 1) for row in core._rows)
            _wait(model.device)
            began = time.perf_counter()
            core.turn()
            taken.append(time.perf_counter() - began)
            core.take()
    device_s = passes.seconds()
    while core.busy:
        core.turn()
        core.take()
    read = weight_bytes(model) + kept / steps
    return against_bound(taken, streams, read, speed, device_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
