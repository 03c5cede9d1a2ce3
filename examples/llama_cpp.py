"""llama.cpp on the fabric, by the binding `xllamacpp`; chat, stop strings, choices and continued answers are TextModelWorker's.

zfabric-worker --backend examples.llama_cpp:LlamaCppWorker --model SmolLM2-135M-Instruct.Q4_1.gguf --model-names smollm2
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zfabric import BackendError, ConfigurationError, ContextOverflowError, GenerateRequest, ModelInfo, TextModelWorker
from zfabric.backends.front import text_of


@dataclass(frozen=True, kw_only=True)
class LlamaCppOptions:
    """Options of the backend.

    Attributes:
        model: A GGUF file.
        model_names: Names it serves, the file's by default; the first is the model, the others aliases.
        context_length: Tokens of a prompt and its answer.
        parallel: Requests that run at a time.
        threads: Threads that compute.
    """

    model: Path
    model_names: tuple[str, ...] = ()
    context_length: int = 2_048
    parallel: int = 4
    threads: int = 2


class LlamaCppWorker(TextModelWorker):
    """Serves one GGUF file. Prompts of chats are in ChatML, as SmolLM2 and many others want them."""

    parameters = frozenset({"temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"})
    repeatable = True
    Options = LlamaCppOptions

    def __init__(self, options: LlamaCppOptions) -> None:
        self.options, self.slots = options, options.parallel

    async def load(self) -> ModelInfo:
        import xllamacpp

        options, given = self.options, xllamacpp.CommonParams()
        if not options.model.is_file():
            raise ConfigurationError(f"there is no file {options.model}")
        given.model.path, given.n_parallel, given.verbosity = str(options.model), options.parallel, -1
        given.n_ctx = options.context_length * options.parallel
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = options.threads
        self.engine = await asyncio.to_thread(xllamacpp.Server, given)
        # A server that is let go of before its own thread has begun waits for that thread for ever.
        first = {"prompt": "x", "n_predict": 1}
        await asyncio.to_thread(self.engine.handle_completions, first, lambda _: False)
        name, *aliases = options.model_names or (options.model.stem,)
        return ModelInfo(name=name, aliases=aliases, context_length=options.context_length)

    def render(self, messages: Any) -> str:
        turns = [f"<|im_start|>{message['role']}\n{text_of(message)}<|im_end|>\n" for message in messages]
        return "".join([*turns, "<|im_start|>assistant\n"])

    async def complete(self, prompt: str, request: GenerateRequest) -> AsyncIterator[str]:
        drawn, loop, given_up = request.sampling, asyncio.get_running_loop(), threading.Event()
        body = {name: getattr(drawn, name) for name in ("temperature", "top_p", "top_k", "min_p", "ignore_eos")}
        body |= {"prompt": prompt, "stream": True, "cache_prompt": False, "seed": (drawn.seed or 0) % 2**32}
        body["n_predict"] = -1 if drawn.max_new_tokens is None else drawn.max_new_tokens
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        def made(event: dict[str, Any]) -> bool:
            loop.call_soon_threadsafe(events.put_nowait, event)
            return given_up.is_set()  # which ends it

        running = loop.run_in_executor(None, self.engine.handle_completions, body, made)
        running.add_done_callback(lambda _: events.put_nowait({}))
        try:
            while event := await events.get():
                if "choices" not in event:
                    raise _error(event.get("error", event))
                yield event["choices"][0]["text"]
            await running  # which raises what the engine did
        finally:
            given_up.set()


def _error(said: dict[str, Any]) -> BackendError | ContextOverflowError:
    if said.get("type") == "exceed_context_size_error":
        return ContextOverflowError(
            said["message"], prompt_tokens=said["n_prompt_tokens"], context_length=said["n_ctx"]
        )
    return BackendError(f"llama.cpp says: {said.get('message', said)}")
