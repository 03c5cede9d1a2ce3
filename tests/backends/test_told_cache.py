"""What ModelWorker tells the controller of its cache is what it finds there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import pytest

from tests.backends.told import Told
from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError

#: Tokens of a block on a CPU.
UNIT = 16


def options(model: Path, kv_cache: Literal["padded", "paged"]) -> TransformersOptions:
    return TransformersOptions(
        model=str(model), model_names=("tiny",), dtype="float32", device="cpu", threads=1, kv_tokens_max=24 * UNIT,
        context_length=16 * UNIT, kv_cache=kv_cache, tell_cache=True,
    )  # fmt: skip


async def test_what_is_believed_is_what_the_engine_finds(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with (
            fabric(f"ipc://{directory}/c.sock", policy="prefix_aware") as made,
            AsyncClient(made.endpoint) as client,
        ):
            await made.add_worker("w0", ModelWorker(options(tiny_llama, "paged")))
            await Told(monkeypatch, made, client, "tiny", UNIT).compare()


async def test_rows_that_share_nothing_have_nothing_to_tell(tiny_llama: Path) -> None:
    worker = ModelWorker(options(tiny_llama, "padded"))
    try:
        with pytest.raises(ConfigurationError, match="needs a cache of pages"):
            await worker.load()
    finally:
        await worker.close()
