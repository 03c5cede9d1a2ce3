"""PyTorch models through transformers: continuous batching, per-request sampling, embeddings.

`worker` is the door. Below it each room imports itself and those after it in this list:

- `setup`: all of an engine put together, in this process and in those of further ranks.
- `scheduling`: which rows a step computes, in what order, and what becomes of them.
- `speculative`: guesses at what a row goes on with.
- `checks`: whether a model's rows say beside others what each says alone.
- `loading`: a model from its files, and the memory it may take.
- `pooling`: vectors, scores and labels instead of text.
- `runner`: one forward pass, by the kinds of models.
- `cache`: keys, values and states of rows, and attention over them.
- `sampling`: from the logits of a step to tokens.
- `request`: what is asked and how far its answer is.
- `parameters`: what a model computes with: weights as they are stored, packed, quantized, adapted and replaced.
"""

from __future__ import annotations

from zfabric.backends.hf_transformers.foreign_logs import hush

# Before anything here imports transformers, in whichever process.
hush()
