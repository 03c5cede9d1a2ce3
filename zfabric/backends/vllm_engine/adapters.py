"""LoRA adapters: each is a model of its own to clients."""

from __future__ import annotations

from typing import Any

from zfabric.errors import FabricError, RequestError, UnknownModelError


class Adapters:
    """The adapters that are loaded, by name. The first request that needs one brings its weights in.

    Args:
        engine: An `AsyncLLM`.
        enabled: Whether it was started with `--enable-lora`.
    """

    def __init__(self, engine: Any, *, enabled: bool) -> None:
        self._engine = engine
        self._enabled = enabled
        self._loaded: dict[str, Any] = {}
        self._number = 0

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._loaded)

    def find(self, model: str) -> Any:
        """vLLM's `LoRARequest` of a model's name, None for the base model."""
        return self._loaded.get(model)

    async def load(self, name: str, path: str) -> None:
        """Load an adapter.

        Raises:
            RequestError: Adapters are not enabled, the name is taken, or the engine cannot load it.
        """
        from vllm.lora.request import LoRARequest

        if not self._enabled:
            raise RequestError("this worker was started without --enable-lora")
        if name in self._loaded:
            raise RequestError(f"an adapter {name!r} is loaded already", name=name)
        self._number += 1
        wanted = LoRARequest(lora_name=name, lora_int_id=self._number, lora_path=path)
        try:
            await self._engine.add_lora(wanted)
        except FabricError:
            raise
        except Exception as error:  # noqa: BLE001 — it comes from another process, as whatever that raised
            raise RequestError(f"adapter {name!r} cannot be loaded from {path}: {error}", name=name) from None
        self._loaded[name] = wanted

    async def unload(self, name: str) -> None:
        """Forget an adapter; running requests finish with it.

        Raises:
            UnknownModelError: No such adapter.
        """
        found = self._loaded.pop(name, None)
        if found is None:
            raise UnknownModelError(f"no adapter {name!r} is loaded", model=name)
        await self._engine.remove_lora(found.lora_int_id)
