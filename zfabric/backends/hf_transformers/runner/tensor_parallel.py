"""One model over several processes, each with a part of every layer: the worker is rank 0, and leads the others.

All of them load the model and try it in the same order, each at its part (`check`, `join`). From then on rank 0 tells the others
what each pass over pages computes before it computes it, through a pipe, and they meet in the layers' sums. Draws, texts and
blocks are rank 0's alone. A rank ends when its pipe does, so however the worker ends, none stays; and when a rank ends, the
engine cannot go on, nor when a pass breaks: nobody knows how far the others came.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import torch
import torch.distributed as dist

from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout
from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.options import Narrow, TransformersOptions
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.errors import BackendError, ConfigurationError, FabricError

#: Bytes of a message, before it.
LENGTH: Final = struct.Struct("<Q")
#: What a rank says when it has come so far that it can be waited for.
READY: Final = b"ready\n"
#: Seconds that ranks wait for one another: one may read its weights for that much longer than another. Once they serve, a turn
#: that hangs is noticed much earlier (`stall_ms`), and a rank that ends at once.
_MEET_S: Final = 1_800
#: Seconds that a rank has to end by itself.
_END_S: Final = 5.0
#: Options that are of several parts of a model, or change its layers, and those that do without pages.
_REFUSED: Final = (
    "adapters_dir", "assistant", "compile", "cpu_offload", "device_map", "gguf_file", "lora", "quantization", "weights_dir",
)  # fmt: skip


def check(options: TransformersOptions) -> None:
    """Raises: ConfigurationError: Other options do not go with several ranks."""
    for name in _REFUSED:
        if getattr(options, name):
            raise ConfigurationError(f"tensor_parallel does not go with {name}")
    if options.kv_cache == "padded":
        raise ConfigurationError("tensor_parallel goes with a paged cache, not a padded one")
    if dist.is_initialized():
        raise ConfigurationError("one model of a process can have several ranks, and this one has such a model")
    count, gpus = options.tensor_parallel, torch.cuda.device_count()
    if count < 1:
        raise ConfigurationError(f"tensor_parallel counts processes, and {count} are none")
    if ":" in options.device or (options.device == "cpu" and gpus):
        # transformers takes them in their order, and leaves none out.
        raise ConfigurationError(
            f"tensor_parallel takes GPUs from the first on: CUDA_VISIBLE_DEVICES says which, and not device {options.device!r}"
        )
    if options.device != "cpu" and 0 < gpus < count:
        raise ConfigurationError(f"tensor_parallel {count} needs as many GPUs, and there are {gpus}")


def check_model(config: Any, kind: str, name: str, count: int) -> None:
    """Raises: ConfigurationError: A model cannot be divided into so many parts."""
    if kind != "causal":
        raise ConfigurationError(f"tensor_parallel goes with causal language models alone, and {name!r} is {kind}")
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ConfigurationError(f"{name!r} cannot be divided: transformers has no plan for type {text.model_type!r}")
    for size in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, size, None)
        if heads and heads % count:
            raise ConfigurationError(f"{name!r} cannot be divided by {count}: its {size} are {heads}")


def join(options: TransformersOptions, rank: int, store: str) -> None:
    """Meet the other ranks.

    Args:
        store: A file that all of them find one another by.

    Raises:
        RuntimeError: They do not come.
    """
    cuda = options.device != "cpu" and torch.cuda.device_count() > 0
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(store, options.tensor_parallel),
        rank=rank,
        world_size=options.tensor_parallel,
        timeout=timedelta(seconds=_MEET_S),
    )


class Ranks:
    """The ranks after the first, as processes.

    Args:
        options: Of the worker.
        on_lost: Called once, on a thread of its own, when one ends that is not told to.

    Attributes:
        lost: Why the model cannot be computed any more.

    Raises:
        ConfigurationError: They do not start.
    """

    def __init__(self, options: TransformersOptions, on_lost: Callable[[FabricError], None]) -> None:
        check(options)
        self._on_lost = on_lost
        self.lost: FabricError | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._directory = tempfile.mkdtemp(prefix="zfabric-ranks-")
        store = str(Path(self._directory) / "store")
        # Ranks are on one host, and listen to nobody beyond it.
        environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "zfabric.backends.hf_transformers.setup.rank"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**environment, "LOCAL_RANK": str(rank)},
            )
            for rank in range(1, options.tensor_parallel)
        ]
        try:
            for rank, process in enumerate(self._processes, 1):
                _write(process.stdin, [options, rank, store])
            for rank, process in enumerate(self._processes, 1):
                assert process.stdout is not None
                if process.stdout.readline() != READY:
                    raise ConfigurationError(f"rank {rank} of {options.model!r} did not start: see its log")
            join(options, 0, store)
        except BaseException:
            self.close()
            raise
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._wait, args=(rank, process), name=f"rank-{rank}", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Tell all of them. Raises: BackendError: The model cannot be computed any more."""
        if self.lost is not None:
            raise self.lost
        try:
            for process in self._processes:
                _write(process.stdin, message)
        except OSError as error:
            raise self.lose("a rank of the model does not listen any more") from error

    def lose(self, because: str) -> FabricError:
        """The model cannot be computed any more."""
        with self._lock:
            if self.lost is None:
                self.lost = BackendError(because)
        return self.lost

    def close(self) -> None:
        """End them. Safe to call twice."""
        self._closed = True
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.close()
            except OSError:
                process.kill()
            process.stdout.close()
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._closed:
            self._on_lost(self.lose(f"rank {rank} of the model ended with {code}"))


class LeadingCache(PagedCache):
    """Blocks of rank 0, whose copies the other ranks make as well; arguments as of `PagedCache`."""

    def __init__(self, blocks: int, tokens: int, narrow: Narrow | None, layout: KVLayout, ranks: Ranks) -> None:
        super().__init__(blocks, tokens, narrow, layout)
        self._ranks = ranks

    def copy(self, source: int, target: int) -> None:
        """What one block holds, to another."""
        self._ranks.send("copy", source, target)
        super().copy(source, target)


class LeadingRunner(PagedRunner):
    """Rank 0 of a decoder over blocks; arguments as of `PagedRunner`."""

    def __init__(
        self, model: ModelRunner, blocks: int, tokens: int, narrow: Narrow | None, layout: KVLayout, ranks: Ranks
    ) -> None:
        super().__init__(model, blocks, tokens, narrow, layout)
        self.cache = LeadingCache(blocks, tokens, narrow, layout, ranks)
        self._ranks = ranks
        ranks.send("pool", blocks, tokens, narrow, layout)

    def forward(self, parts: Sequence[Part], drawn: torch.Tensor | None = None) -> torch.Tensor:
        """See `PagedRunner`. Raises: BackendError: A rank is gone, or a pass broke before."""
        rows = [
            (list(part.tokens), part.length, [table.blocks for table in part.tables.each], part.logits)
            for part in parts
        ]
        self._ranks.send("pass", rows, 0 if drawn is None else drawn.shape[0])
        try:
            if drawn is not None:
                # They are on the device, and the host may not know them yet.
                drawn = drawn.to(torch.long)
                dist.broadcast(drawn, 0)
            return super().forward(parts, drawn)
        except BaseException as error:
            self._ranks.lose(f"a pass of several ranks broke: {type(error).__name__}: {error}")
            raise


def _write(pipe: BinaryIO | Any, message: Any) -> None:
    # Paths among the options are texts on their way.
    content = msgspec.msgpack.encode(message, enc_hook=str)
    pipe.write(LENGTH.pack(len(content)) + content)
    pipe.flush()
