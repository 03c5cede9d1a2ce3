"""A rank after the first of a model over several processes: does in its part of the layers what rank 0 does; see
`tensor_parallel`. `python -m` runs it, with messages of rank 0 at its standard input."""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import Any, BinaryIO

import msgspec
import torch
import torch.distributed as dist

from zfabric.backends.hf_transformers.cache.block_table import table_of
from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout
from zfabric.backends.hf_transformers.checks.paged_check import layout_or_reason
from zfabric.backends.hf_transformers.checks.self_check import check_rows
from zfabric.backends.hf_transformers.loading.model_loader import load
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner import tensor_parallel
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.backends.hf_transformers.runner.rope import Ropes
from zfabric.wire.payloads import GenerateRequest

_NOBODY = Answer(GenerateRequest())


def main() -> None:
    """Until the standard input ends, at once then: the worker is gone, and a sum may never come to an end."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, messages), daemon=True).start()
    told, rank, store = messages.get()
    options = msgspec.convert(told, TransformersOptions, dec_hook=lambda kind, value: kind(value))
    said = os.dup(sys.stdout.fileno())
    # What libraries print goes to the log.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.write(said, tensor_parallel.READY)
    os.close(said)
    tensor_parallel.join(options, rank, store)
    model = _model(options)
    _, blocks, tokens, narrow, layout = messages.get()
    runner = PagedRunner(model, blocks, tokens, narrow, layout_told(layout))
    model.warm_up()
    with torch.inference_mode():
        while True:
            name, *its = messages.get()
            if name == "copy":
                runner.cache.copy(*its)
            else:
                _pass(runner, *its)


def layout_told(told: Any) -> KVLayout:
    """Which layers share blocks, as it comes out of a pipe."""
    return msgspec.convert(told, KVLayout)


def _pass(runner: PagedRunner, rows: Any, drawn: int) -> None:
    """Compute what rank 0 computes; so many tokens of it are on its device alone."""
    tokens = None
    if drawn:
        tokens = torch.empty(drawn, dtype=torch.long, device=runner.model.device)
        dist.broadcast(tokens, 0)
    runner.forward([Part(_NOBODY, row, end, table_of(*tables), logits) for row, end, tables, logits in rows], tokens)


def _model(options: TransformersOptions) -> ModelRunner:
    """Loaded and tried, in the order in which rank 0 does that."""
    loaded = load(options)
    model = ModelRunner(loaded.model, Ropes(loaded.model))
    check_rows(model, loaded.model, loaded.tokenizer, options.model)
    layout_or_reason(loaded, model, options)
    return model


def _read(pipe: BinaryIO, messages: queue.SimpleQueue[Any]) -> None:
    while True:
        head = pipe.read(tensor_parallel.LENGTH.size)
        content = pipe.read(*tensor_parallel.LENGTH.unpack(head)) if len(head) == tensor_parallel.LENGTH.size else b""
        if not content:
            os._exit(0)
        messages.put(msgspec.msgpack.decode(content))


if __name__ == "__main__":
    main()
