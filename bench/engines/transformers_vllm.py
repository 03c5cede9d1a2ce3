"""vLLM's tokens per second on a model, beside which `bench.engines.transformers` puts its own.

Usage: python -m bench.engines.transformers_vllm DIRECTORY DTYPE {cpu,device} TOKENS STREAMS… prints one JSON object. A process of
its own, since vLLM binds threads and sets up much for all of it. Tokens by id; on a CPU one computing thread and no compiled
graphs, on a device all that vLLM does there by itself, with as much memory as the others leave it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engines.vllm import ENVIRONMENT, bare, measure
from zfabric.backends.hf_transformers.loading.context_length import context_length

PROMPT_TOKENS = 24
RUNS = 2
#: At most, since vLLM refuses what its cache could not hold.
CONTEXT_TOKENS = 2_048


async def rates(directory: str, dtype: str, place: str, tokens: int, streams: Sequence[int]) -> dict[str, float]:
    """The better of two runs each, after one that warms up."""
    async with bare(arguments(directory, dtype, place), None, Path(directory)) as stream:
        return await _rates(stream, tokens, streams)


def arguments(directory: str, dtype: str, place: str) -> list[str]:
    """Of its engine, whose context is no longer than the model's own."""
    from transformers import AutoConfig

    length = min(CONTEXT_TOKENS, context_length(AutoConfig.from_pretrained(directory).get_text_config()))
    return [
        "--model", directory, "--dtype", dtype, "--max-model-len", str(length), "--max-num-seqs", "64",
        "--distributed-executor-backend", "uni", "--no-enable-prefix-caching",
        *(["--enforce-eager"] if place == "cpu" else ["--gpu-memory-utilization", "0.4"]),
    ]  # fmt: skip


async def _rates(stream: Any, tokens: int, streams: Sequence[int]) -> dict[str, float]:
    chance = random.Random(0)
    found = {}
    for count in streams:
        await measure(stream, count, PROMPT_TOKENS, 8, chance)
        runs = [await measure(stream, count, PROMPT_TOKENS, tokens, chance) for _ in range(RUNS)]
        found[str(count)] = round(max(run.tokens_per_second for run in runs), 1)
    return found


def main() -> None:
    """Entry point."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    directory, dtype, place, tokens, *streams = sys.argv[1:]
    print(json.dumps(asyncio.run(rates(directory, dtype, place, int(tokens), [int(count) for count in streams]))))


if __name__ == "__main__":
    main()
