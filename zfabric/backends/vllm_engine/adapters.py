"""LoRA adapters in the engine: the first request that needs one brings its weights in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from zfabric.backends.front import adapters
from zfabric.errors import FabricError, RequestError


class Adapters(adapters.Adapters[Any]):
    """vLLM's `LoRARequest`s, by name.

    Args:
        engine: An `AsyncLLM`.
        names: Of the model itself.
        enabled: Whether it was started with `--enable-lora`.
    """

    def __init__(self, engine: Any, names: Collection[str], *, enabled: bool) -> None:
        super().__init__(names)
        self._engine = engine
        self._enabled = enabled
        self._number = 0

    async def load(self, name: str, path: str, changed: Callable[[], None] | None = None) -> None:
        """Load an adapter. One of the same name is replaced; what runs on that goes on with it.

        Args:
            changed: See `put`.

        Raises:
            RequestError: Adapters are not enabled, the name is the model's, or the engine cannot load it.
        """
        from vllm.lora.request import LoRARequest

        if not self._enabled:
            raise RequestError("this worker was started without --enable-lora")
        self.check(name)
        self._number += 1
        wanted = LoRARequest(lora_name=name, lora_int_id=self._number, lora_path=path)
        try:
            await self._engine.add_lora(wanted)
        except FabricError:
            raise
        except Exception as error:  # noqa: BLE001 — it comes from another process, as whatever that raised
            raise RequestError(f"adapter {name!r} cannot be loaded from {path}: {error}", name=name) from None
        before = self.get(name)
        try:
            self.put(name, wanted, changed)
        except BaseException:
            await self._engine.remove_lora(wanted.lora_int_id)
            raise
        if before is not None:
            await self._engine.remove_lora(before.lora_int_id)

    async def unload(self, name: str, changed: Callable[[], None] | None = None) -> None:
        """Forget an adapter; running requests finish with it.

        Raises:
            UnknownModelError: No such adapter.
        """
        await self._engine.remove_lora(self.drop(name, changed).lora_int_id)

    @property
    def told(self) -> dict[str, dict[str, str]]:
        """What operators are told: {name: {path}}."""
        return {name: {"path": str(adapter.lora_path)} for name, adapter in zip(self.names, self, strict=True)}
