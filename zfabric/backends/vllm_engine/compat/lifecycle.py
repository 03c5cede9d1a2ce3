"""The beginning and the end of an engine."""

from __future__ import annotations

import asyncio
from typing import Any

from zfabric.backends.vllm_engine.compat.rendering import tokens_input


def watch_outputs(engine: Any) -> None:
    """Let the engine's reader run from now on, not only from the first request on: it is what notices a death."""
    engine._run_output_handler()


async def shut_down(engine: Any) -> None:
    """End the engine and its processes, which takes seconds."""
    if engine.output_handler is not None:
        # It would report the end as a failure.
        engine.output_handler.cancel()
    await asyncio.to_thread(engine.shutdown)
    # vLLM closes the sockets, and leaves their context to whoever collects garbage.
    await asyncio.to_thread(engine.engine_core.resources.ctx.destroy, 0)


async def warm_up(engine: Any) -> None:
    """Let the engine compile what it compiles at the first request for log-probabilities.

    That takes seconds, and all running streams would wait for it.
    """
    from vllm import SamplingParams

    # An engine may be told to give none.
    wanted = 1 if engine.vllm_config.model_config.max_logprobs else None
    async for _ in engine.generate(tokens_input([0]), SamplingParams(max_tokens=1, logprobs=wanted), "warm-up"):
        pass
