"""An operator's calls to one worker: `zfabric operate WORKER CALL name=value …`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

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
        self._on_models = on_models
        self._calls: dict[str, Callable[[OperateRequest], Awaitable[Any]]] = {
            "list_adapters": self._list_adapters,
            "load_adapter": self._load_adapter,
            "reset_prefix_cache": self._reset_prefix_cache,
            "sleep": self._sleep,
            "unload_adapter": self._unload_adapter,
            "wake_up": self._wake_up,
        }

    async def run(self, request: OperateRequest) -> Any:
        """Do it.

        Raises:
            UnsupportedOperationError: No such call, or the model or device has none.
            RequestError: An argument is missing or unknown.
        """
        call = self._calls.get(request.call)
        if call is None:
            known = ", ".join(sorted(self._calls))
            raise UnsupportedOperationError(
                f"vllm has no call {request.call!r}, it has {known}", operation="operate", call=request.call
            )
        return await call(request)

    async def _reset_prefix_cache(self, request: OperateRequest) -> bool:
        _arguments(request)
        return bool(await self._runtime.engine.reset_prefix_cache())

    async def _sleep(self, request: OperateRequest) -> bool:
        given = _arguments(request, level=1)
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
        _arguments(request)
        level, engine = self._runtime.asleep, self._runtime.engine
        if level == _WITHOUT_WEIGHTS:
            await engine.wake_up(["weights"])
            await engine.collective_rpc("reload_weights")
            await engine.wake_up(["kv_cache"])
        elif level:
            await engine.wake_up()
        self._runtime.asleep = 0
        return True

    async def _load_adapter(self, request: OperateRequest) -> dict[str, Any]:
        given = _arguments(request, "name", "path")
        await self._runtime.adapters.load(str(given["name"]), str(given["path"]), self._on_models)
        return self._runtime.adapters.told

    async def _unload_adapter(self, request: OperateRequest) -> dict[str, Any]:
        given = _arguments(request, "name")
        await self._runtime.adapters.unload(str(given["name"]), self._on_models)
        return self._runtime.adapters.told

    async def _list_adapters(self, request: OperateRequest) -> dict[str, Any]:
        _arguments(request)
        return self._runtime.adapters.told


def _arguments(request: OperateRequest, *required: str, **optional: Any) -> dict[str, Any]:
    """The call's arguments. Raises: RequestError if some are missing or unknown."""
    given = request.arguments
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in required and name not in optional]
    if missing or unknown:
        words = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
        raise RequestError(f"call {request.call!r}: {', '.join(words)}", call=request.call)
    return {**optional, **given}
