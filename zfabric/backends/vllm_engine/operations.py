"""An operator's calls to one worker: `zfabric operate WORKER CALL name=value …`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from zfabric.backends.front.adapters import AdapterCalls
from zfabric.backends.front.operator_calls import arguments_of, no_such_call
from zfabric.backends.vllm_engine.adapters import Adapter
from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.wire.payloads import OperateRequest

if TYPE_CHECKING:
    from zfabric.backends.vllm_engine.runtime import Runtime

#: From the second on vLLM keeps no copy of the weights, and has to be told to read them again.
_WITHOUT_WEIGHTS: Final = 2
_SLEEP_LEVELS: Final = (1, _WITHOUT_WEIGHTS)


class Operations:
    """What there is to call.

    Args:
        runtime: The running engine.
        on_models: Called when the set of models has changed.
    """

    def __init__(self, runtime: Runtime, on_models: Callable[[], None]) -> None:
        self._runtime = runtime
        base = runtime.arguments.names[0]
        adapters: AdapterCalls[Adapter] = AdapterCalls(runtime.adapters, runtime.lora, base, on_models, runtime.offered)
        self._calls: dict[str, Callable[[OperateRequest], Awaitable[Any]]] = {
            **dict.fromkeys(AdapterCalls.NAMES, adapters.run),
            "reset_prefix_cache": self._reset_prefix_cache,
            "sleep": self._sleep,
            "wake_up": self._wake_up,
        }

    async def run(self, request: OperateRequest) -> Any:
        """Do it.

        Raises:
            UnsupportedOperationError: No such call, or the model or device has none.
            RequestError: An argument is missing, unknown, or of another type; or see `AdapterCalls.run`.
        """
        call = self._calls.get(request.call)
        if call is None:
            raise no_such_call(request, "vllm", list(self._calls))
        return await call(request)

    async def _reset_prefix_cache(self, request: OperateRequest) -> bool:
        arguments_of(request)
        return bool(await self._runtime.engine.reset_prefix_cache())

    async def _sleep(self, request: OperateRequest) -> bool:
        given = arguments_of(request, level=1)
        if not self._runtime.engine.vllm_config.model_config.enable_sleep_mode:
            raise UnsupportedOperationError("this worker was started without --enable-sleep-mode", operation="sleep")
        level = given["level"]
        if level not in _SLEEP_LEVELS:
            raise RequestError(f"level is {level!r}, it must be 1 or 2", parameter="level")
        # What runs goes on elsewhere: the engine aborts it.
        self._runtime.asleep = level
        await self._runtime.engine.sleep(level)
        return True

    async def _wake_up(self, request: OperateRequest) -> bool:
        arguments_of(request)
        level, engine = self._runtime.asleep, self._runtime.engine
        if level == _WITHOUT_WEIGHTS:
            await engine.wake_up(["weights"])
            await engine.collective_rpc("reload_weights")
            await engine.wake_up(["kv_cache"])
        elif level:
            await engine.wake_up()
        self._runtime.asleep = 0
        return True
