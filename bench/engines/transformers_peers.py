"""What `bench.engines.transformers` puts beside the worker: transformers' own ways to answer several requests, and vLLM."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.engines.transformers_vllm import READY


def one_by_one(model: Any, prompts: Sequence[list[int]], count: int) -> float:
    """Tokens per second of transformers' own generate."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    given = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    with torch.inference_mode():
        model.generate(given[0], max_new_tokens=4, **options).cpu()
        began = time.perf_counter()
        for one in given:
            # On a device an answer is there when it has come to the host.
            model.generate(one, max_new_tokens=count, **options).cpu()
    return len(prompts) * count / (time.perf_counter() - began)


def continuous(model: Any, prompts: Sequence[list[int]], count: int) -> float:
    """Tokens per second of transformers' own continuous batching, its set-up not counted."""
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=2)
    # Without a bound it takes most of the machine's memory.
    shape = ContinuousBatchingConfig(page_size=32, num_blocks=256, max_batch_tokens=512)
    manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=shape)
    manager.start()
    try:
        for run in range(2):
            began = time.perf_counter()
            for number, prompt in enumerate(prompts):
                manager.add_request(prompt, request_id=f"{run} {number}", max_new_tokens=count)
            done = 0
            while done < len(prompts):
                result = manager.get_result(timeout=60)
                if result is None and not manager.is_running():
                    raise RuntimeError("its thread has ended")
                done += result is not None and result.is_finished()
            seconds = time.perf_counter() - began
    finally:
        manager.stop(block=True, timeout=10)
    return len(prompts) * count / seconds


class VLLM:
    """vLLM's own engine, in a process of its own.

    Raises:
        RuntimeError: It does not start, or ends.
    """

    def __init__(self, directory: Path, dtype: str, *, device: str) -> None:
        place = "cpu" if device == "cpu" else "device"
        command = [sys.executable, "-m", "bench.engines.transformers_vllm", str(directory), dtype, place]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._until(lambda line: line == READY)

    def rate(self, count: int, streams: int) -> float:
        """Tokens per second of so many answers at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{streams} {count}\n")
        self._process.stdin.flush()
        return float(self._until(_is_number))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _until(self, wanted: Callable[[str], bool]) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if wanted(line.strip()):
                return line.strip()
        raise RuntimeError(f"vLLM's process ended with status {self._process.wait()}")


def _is_number(line: str) -> bool:
    return line.replace(".", "", 1).isdigit()
