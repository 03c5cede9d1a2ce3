"""An engine that holds the interpreter, as extension code does that never lets go of it: a tokenizer's, a kernel's build."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator
from typing import Final

from zfabric import BaseModelWorker, Delta, ModelInfo
from zfabric.wire.payloads import GenerateRequest

#: Longer than a lease, and than the time after which a silent path is looked at.
HELD_S: Final = 5
#: The answer's position at which it happens.
HELD_AT: Final = 20
_STEP_S: Final = 0.02


def hold_the_interpreter() -> None:
    """No thread of this process runs any Python meanwhile."""
    ctypes.PyDLL(None).sleep(HELD_S)


class Holding(BaseModelWorker):
    """Says the prompt's words again, and holds the interpreter once in the middle if the first of them is `hold`.

    An attempt that goes on holds nothing: a request that ends each of its workers has to fail.
    """

    parameters = frozenset({"max_new_tokens", "temperature", "seed"})
    slots = 64

    async def load(self) -> ModelInfo:
        return ModelInfo(name="holding", capabilities=["generate", "resume"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        words = request.plain_text().split()
        for position in range(len(request.resume_token_ids), request.sampling.max_new_tokens or len(words)):
            await asyncio.sleep(_STEP_S)
            if position == HELD_AT and words[0] == "hold" and not request.resume_token_ids:
                await asyncio.to_thread(hold_the_interpreter)
            token = position % len(words)
            yield Delta(text=words[token] + " ", token_ids=[token])
        yield Delta(finish_reason="length")
