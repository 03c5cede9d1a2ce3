"""vLLM's tokens per second on a model, beside which `bench.engines.transformers` puts its own.

Usage: python -m bench.engines.transformers_vllm DIRECTORY DTYPE {cpu,device} prints ``ready``, and then a number for each line
``STREAMS TOKENS`` that it reads. A process of its own, since vLLM binds threads and sets up much for all of it. Tokens by id; on
a CPU one computing thread and no compiled graphs, on a device all that vLLM does there by itself, with as much memory as the
others leave it.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

from bench.engines.vllm import ENVIRONMENT, bare, measure
from zfabric.backends.hf_transformers.loading.context_length import context_length

PROMPT_TOKENS = 24
#: Its first line. What else it prints there is another's.
READY = "ready"
#: At most, since vLLM refuses what its cache could not hold.
CONTEXT_TOKENS = 2_048


async def serve(directory: str, dtype: str, place: str) -> None:
    """Measure what is asked for, until nothing more is. Prompts are new each time."""
    chance = random.Random(0)
    loop = asyncio.get_running_loop()
    async with bare(arguments(directory, dtype, place), None, Path(directory)) as stream:
        print(READY, flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            streams, tokens = map(int, line.split())
            run = await measure(stream, streams, PROMPT_TOKENS, tokens, chance)
            print(run.tokens_per_second, flush=True)


def arguments(directory: str, dtype: str, place: str) -> list[str]:
    """Of its engine, whose context is no longer than the model's own."""
    from transformers import AutoConfig

    length = min(CONTEXT_TOKENS, context_length(AutoConfig.from_pretrained(directory).get_text_config()))
    return [
        "--model", directory, "--dtype", dtype, "--max-model-len", str(length), "--max-num-seqs", "64",
        "--distributed-executor-backend", "uni", "--no-enable-prefix-caching",
        *(["--enforce-eager"] if place == "cpu" else ["--gpu-memory-utilization", "0.4"]),
    ]  # fmt: skip


def main() -> None:
    """Entry point."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    directory, dtype, place = sys.argv[1:]
    asyncio.run(serve(directory, dtype, place))


if __name__ == "__main__":
    main()
