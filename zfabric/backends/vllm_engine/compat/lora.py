"""Adapters as vLLM's engine knows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lora_request(name: str, number: int, path: str) -> Any:
    """What names an adapter in the engine.

    vLLM takes adapters of the same name for one, finds their cached prefixes by name and path, and keeps them apart by number
    alone while it computes. So that one may replace another of its name while that still runs, each has a name of its own there.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=f"{name}#{number}", lora_int_id=number, lora_path=path)


def rank_of(path: str) -> int | None:
    """The greatest rank of an adapter; None where its files do not tell. It may ask a hub: call it on a thread."""
    from vllm.lora.utils import get_adapter_absolute_path

    try:
        settings = json.loads((Path(get_adapter_absolute_path(path)) / "adapter_config.json").read_text("utf-8"))
        return int(max([settings["r"], *(settings.get("rank_pattern") or {}).values()]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
