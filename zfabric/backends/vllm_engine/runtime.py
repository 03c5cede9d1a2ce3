"""The running engine and what belongs to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from zfabric.backends.front.adapter_directory import AdapterDirectory
from zfabric.backends.front.adapters import Adapters
from zfabric.backends.front.parsing import AnswerFormat
from zfabric.backends.vllm_engine import sampling
from zfabric.backends.vllm_engine.adapters import Adapter, Lora
from zfabric.backends.vllm_engine.arguments import Arguments
from zfabric.backends.vllm_engine.compat.cache_events import CacheEvents
from zfabric.backends.vllm_engine.compat.lifecycle import shut_down, warm_up, watch_outputs
from zfabric.backends.vllm_engine.compat.metrics import record_alone, statistics_logger
from zfabric.backends.vllm_engine.compat.one_by_one import OneByOne
from zfabric.backends.vllm_engine.compat.placement import start_engine
from zfabric.backends.vllm_engine.compat.rendering import end_tokens
from zfabric.backends.vllm_engine.compat.step_tap import StepTap
from zfabric.backends.vllm_engine.compat.tap_check import open_outputs
from zfabric.backends.vllm_engine.pooling import Pooling
from zfabric.backends.vllm_engine.prompts import Prompts
from zfabric.backends.vllm_engine.reading import Reading, answer_format
from zfabric.backends.vllm_engine.statistics import Statistics
from zfabric.errors import ConfigurationError


class Runtime:
    """An engine that has started.

    Attributes:
        engine: vLLM's `AsyncLLM`.
        context_length: Tokens of prompt and answer.
        slots: Requests that the engine's batch holds, over all data-parallel ranks.
        format: How the model writes reasoning and calls.
        cache_events: What it tells of its prefix cache, where that is wanted.
        asleep: The level at which an operator has put it to sleep, 0 if it is awake.
        outputs: Where what it makes comes from, once it is open.
    """

    def __init__(
        self,
        engine: Any,
        arguments: Arguments,
        statistics: Statistics,
        form: AnswerFormat,
        cache_events: CacheEvents | None = None,
    ) -> None:
        configuration = engine.vllm_config
        self.engine = engine
        self.arguments = arguments
        self.statistics = statistics
        self.cache_events = cache_events
        self.asleep = 0
        self.context_length = int(configuration.model_config.max_model_len)
        ranks = int(configuration.parallel_config.data_parallel_size)
        self.slots = int(configuration.scheduler_config.max_num_seqs) * ranks
        #: vLLM has priorities only where it was told to.
        self.priorities = configuration.scheduler_config.policy == "priority"
        self.end_tokens = end_tokens(engine)
        self.defaults = sampling.defaults(engine)
        self.adapters: Adapters[Adapter] = Adapters(arguments.names)
        self.offered = AdapterDirectory(arguments.adapters_dir, arguments.names)
        self.lora = Lora(engine, int(getattr(configuration.lora_config, "max_loras", 0)))
        self.prompts = Prompts(engine, self.context_length, arguments.chat_template)
        self.format = form
        self.reading = Reading(form, self.prompts, engine.renderer.get_tokenizer())
        self.tasks: tuple[str, ...] = ()
        self.pooling = Pooling(engine, self.prompts, ())
        self.outputs: StepTap | OneByOne | None = None
        statistics.kv_blocks = int(configuration.cache_config.num_gpu_blocks or 0)

    @classmethod
    def start(cls, arguments: Arguments) -> Runtime:
        """Start the engine. Takes as long as that takes: seconds to many minutes.

        Raises:
            ConfigurationError: vLLM refuses the model or its settings, or there is no parser of such a name.
        """
        statistics = Statistics()
        # The worker reports by itself; vLLM's own loggers and metrics would be kept up to date for nobody.
        arguments.engine.disable_log_stats = True
        form = answer_format(arguments)
        events = CacheEvents(arguments.engine) if arguments.tell_cache else None
        loggers = [statistics_logger(statistics.record)]
        try:
            engine = start_engine(arguments.engine, loggers)
        except BaseException as error:
            if events is not None:
                events.close()
            if not isinstance(error, (OSError, ValueError)):
                raise
            model = str(arguments.engine.model)
            raise ConfigurationError(f"model {model!r} cannot be loaded: {error}", model=model) from error
        record_alone(engine, statistics.record)
        return cls(engine, arguments, statistics, form, events)

    async def open(
        self,
        on_step: Callable[[list[Any]], None],
        on_failure: Callable[[str, BaseException], None],
        on_death: Callable[[BaseException], None],
    ) -> StepTap | OneByOne:
        """Connect the engine to the event loop, and load the adapters that were asked for. Arguments as of `open_outputs`."""
        self.tasks = tuple(await self.engine.get_supported_tasks())
        if self.generates:
            await warm_up(self.engine)
        watch_outputs(self.engine)
        outputs = self.outputs = await open_outputs(
            self.engine, on_step, on_failure, on_death, generates=self.generates
        )
        self.pooling = Pooling(self.engine, self.prompts, self.tasks, at_once=self.slots)
        for name, path in self.arguments.adapters.items():
            self.adapters.check(name)
            self.adapters.put(name, await self.lora.load(name, path, pinned=False))
        return outputs

    @property
    def generates(self) -> bool:
        """Whether it makes text."""
        return "generate" in self.tasks

    def names(self) -> list[str]:
        """All models that it serves: its own, and its adapters."""
        return [self.arguments.names[0], *(adapter.name for adapter in self.adapters)]

    async def close(self) -> None:
        """End it, which takes seconds."""
        if self.outputs is not None:
            await self.outputs.close()
        await shut_down(self.engine)
        if self.cache_events is not None:
            await asyncio.to_thread(self.cache_events.close)
