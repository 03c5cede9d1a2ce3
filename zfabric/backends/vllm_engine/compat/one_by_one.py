"""Outputs by vLLM's public API: where its internals are not as the tap needs them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

from zfabric.backends.vllm_engine.compat.addition import Addition

#: How often the engine is asked whether it lives: requests notice that by themselves, an idle worker should soon.
_HEALTH_INTERVAL_S: Final = 1.0


class OneByOne:
    """Hands out outputs as they come, each as a step of its own: a task and a queue per request, as vLLM has them.

    Args:
        engine: An `AsyncLLM`.
        on_step: Called on the event loop with one `RequestOutput`.
        on_failure: Called on the event loop for a request that the engine refuses.
        on_death: Called on the event loop when the engine will give out nothing any more.
        lacking: Why the tap is not used.

    Attributes:
        goes_on: As of `StepTap`; what an answer's reader has is drawn again here, checked, and left out.
    """

    goes_on = False

    def __init__(
        self,
        engine: Any,
        on_step: Callable[[list[Any]], None],
        on_failure: Callable[[str, BaseException], None],
        on_death: Callable[[BaseException], None],
        lacking: str,
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._on_death = on_death
        self.lacking = lacking
        self._tasks: set[asyncio.Task[None]] = set()
        self._dead = False
        self._start(self._watch())

    async def add(self, asked: Addition) -> None:
        """As of `StepTap`, but for answers that go on. What vLLM refuses is told to `on_failure`."""
        assert asked.continued is None, "answers do not go on here"
        if asked.marks:
            # Not these alone can be shown by the public API: all special tokens are.
            asked.parameters.skip_special_tokens = False
        name = asked.request_id
        outputs = self._engine.generate(asked.given, asked.parameters, name, **asked.arguments)
        self._start(self._read(name, outputs))

    async def close(self) -> None:
        """Stop reading."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, request_id: str, outputs: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self._on_step([output])
        except EngineDeadError as error:
            self._died(error)
        except Exception as error:  # noqa: BLE001 — whatever vLLM raises for a request is that request's error
            self._on_failure(request_id, error)

    async def _watch(self) -> None:
        while not self._dead:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            try:
                await self._engine.check_health()
            except Exception as error:  # noqa: BLE001 — what is not healthy is dead, whatever it says
                self._died(error)

    def _died(self, error: BaseException) -> None:
        if not self._dead:
            self._dead = True
            self._on_death(error)
