"""What a model's cache may take of its device, and how many rows that is."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from zfabric.backends.hf_transformers.cache.narrow_pool import token_bytes as narrow_token_bytes
from zfabric.backends.hf_transformers.cache.state_cache import state_bytes
from zfabric.backends.hf_transformers.failures import named
from zfabric.backends.hf_transformers.loading.context_length import token_bytes
from zfabric.backends.hf_transformers.loading.kinds import Kind
from zfabric.backends.hf_transformers.loading.memory_plan import MemoryPlan, plan
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner.encoder_decoder import EncoderDecoderRunner
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.speech import SpeechRunner
from zfabric.errors import ConfigurationError

#: A CPU's cache: the chats that a CPU can usefully step, of a small model, and several workers share a host.
_CPU_CACHE_BYTES: Final = 1024**3
#: Prompt and answer of a usual request.
USUAL_TOKENS: Final = 1_024
#: What one has of pages at a time: of ShareGPT, whose prompts are 161 tokens and answers 338, 330 in the mean (Kwon et al. 2023,
#: figure 11), so this leaves room for some that are longer; where it was too little, the youngest row waits.
HELD_TOKENS: Final = 512
#: A device reads its weights once for all rows, and computes so many rows in that time; a CPU only few.
_BATCH_MAX: Final = {"cpu": 32, "mps": 32}
_BATCH_MAX_OTHER: Final = 256
#: So many short ones fit nearly any cache; what does not fit waits.
_BATCH_MIN: Final = 4
#: How models of a kind are run, where that is not as decoders are.
RUNNERS: Final[dict[Kind, type[ModelRunner]]] = {"paired": EncoderDecoderRunner, "speech": SpeechRunner}
#: Kinds that make no text.
READERS: Final = ("encoder", "classifier")


class Room(NamedTuple):
    """What a model's cache may take.

    Attributes:
        tokens: In cells, each of which is the keys and values of a token.
        memory: What was planned for it; None where nothing is.
        row_cells: Cells that each row takes, however short its text: those of its states.
        grows: Whether it takes another one with each token.
        search_tokens: Cells of the model's own type that take as much memory: a beam search has such; None where all are of that.
    """

    tokens: int
    memory: MemoryPlan | None = None
    row_cells: int = 0
    grows: bool = True
    search_tokens: int | None = None

    @property
    def usual_row(self) -> int:
        """Cells of a row of usual length."""
        return self.row_cells + USUAL_TOKENS * self.grows

    def took(self, cells: int) -> None:
        """So many cells have memory: see `MemoryPlan.took`."""
        if self.memory is not None:
            self.memory.took(self.memory.bytes * cells // self.tokens)


def runner_of(kind: Kind) -> type[ModelRunner]:
    """How models of a kind are run."""
    return RUNNERS.get(kind, ModelRunner)


def batch_size(device_type: str, kv_tokens_max: int, row: int = USUAL_TOKENS) -> int:
    """Sequences that the cache holds at so many cells each, as far as more of them still make more tokens."""
    return max(_BATCH_MIN, min(_BATCH_MAX.get(device_type, _BATCH_MAX_OTHER), kv_tokens_max // row))


def room_of(model: Any, kind: Kind, options: TransformersOptions, token_bytes_beside: int = 0) -> Room:
    """What the device has left, by what the model writes for one token, and for one row.

    Raises:
        ConfigurationError: The model keeps nothing, or cannot be run; or no row would have room.
    """
    if kind in READERS:
        # It has none, and its requests are bounded by their number alone.
        return Room(options.kv_tokens_max or _BATCH_MAX_OTHER * USUAL_TOKENS)
    runner = runner_of(kind)(model)
    stored = options.narrow
    if model.device.type != "cuda" and options.kv_tokens_max is not None and not runner.states and stored is None:
        return Room(options.kv_tokens_max)
    with named(options.model):
        cache = runner.probe()
    state = state_bytes(cache)
    size = wide = token_bytes(cache)
    if stored is not None and kind not in RUNNERS and not state:
        size = narrow_token_bytes(cache, stored)
    narrowed = size / wide if size < wide else None
    if not size and not state:
        raise ConfigurationError(
            f"a model of type {model.config.model_type!r} keeps no cache of keys and values, which this backend steps by",
            architecture=type(model).__name__,
        )
    grows = size > 0
    # A state that nothing grows beside is counted as a text of usual length.
    size = size or -(-state // USUAL_TOKENS)
    size += token_bytes_beside
    row_cells = -(-state // size)
    if model.device.type != "cuda":
        room = Room(options.kv_tokens_max or max(1, _CPU_CACHE_BYTES // size), None, row_cells, grows)
    else:
        memory = plan(
            str(torch.cuda.get_device_properties(model.device).uuid),
            options.model,
            lambda: int(torch.cuda.mem_get_info(model.device)[0]),
            least=USUAL_TOKENS * size,
            wanted=None if options.kv_tokens_max is None else options.kv_tokens_max * size,
        )
        room = Room(max(1, memory.bytes // size), memory, row_cells, grows)
    if narrowed is not None:
        room = room._replace(search_tokens=int(room.tokens * narrowed))
    # What is to be paged, as an assistant is, is refused for its states themselves.
    if room.tokens < row_cells + grows and options.kv_cache != "paged":
        raise ConfigurationError(
            f"kv_tokens_max is {room.tokens}, and the state of one row of {options.model!r} takes as much as {row_cells} "
            f"tokens",
            model=options.model,
        )
    return room
