"""What `bench.engines.transformers` puts beside the worker: transformers' own ways to answer several requests, and vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig


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


def vllm(directory: Path, dtype: str, count: int, streams: Sequence[int], *, device: str) -> dict[str, float]:
    """Tokens per second of vLLM's own engine by streams, in a process of its own."""
    place = "cpu" if device == "cpu" else "device"
    command = [sys.executable, "-m", "bench.engines.transformers_vllm", str(directory), dtype, place, str(count)]
    output = subprocess.run([*command, *map(str, streams)], check=True, stdout=subprocess.PIPE, text=True).stdout
    rates: dict[str, float] = json.loads(output.splitlines()[-1])
    return {f"vllm_{number}_tokens_per_s": rate for number, rate in rates.items()}
