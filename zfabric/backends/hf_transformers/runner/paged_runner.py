"""The forward pass over pages: the tokens of all rows in one line, prompts and steps together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch

from zfabric.backends.hf_transformers.cache.block_table import BlockTables, table_of
from zfabric.backends.hf_transformers.cache.kv_layout import ONE_TABLE, KVLayout
from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass, StepTables
from zfabric.backends.hf_transformers.options import Narrow
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.step_graphs import Capture, StepGraphs
from zfabric.backends.hf_transformers.runner.vision import Embedded, Insert
from zfabric.wire.payloads import GenerateRequest

_NOBODY = Answer(GenerateRequest())


class Part(NamedTuple):
    """What a pass computes of one row.

    Attributes:
        tokens: Those that are computed.
        length: Tokens of the row afterwards.
        tables: Where they lie.
        logits: After which of the tokens they are wanted.
        embedded: What its prompt is, if it has pictures: its tokens are those vectors.
    """

    answer: Answer
    tokens: Sequence[int]
    length: int
    tables: BlockTables
    logits: Literal["none", "last", "all"]
    embedded: Embedded | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of its tokens, those that see one another."""
        if self.embedded is None:
            return []
        begin = self.length - len(self.tokens)
        return [span for span in self.embedded.spans if begin < span[1] and span[0] < self.length]


class PagedRunner:
    """A decoder over a pool of blocks.

    Args:
        model: Its forward pass.
        blocks: Of the pool.
        tokens: That each has room for.
        narrow, layout: See `PagedCache`.
    """

    def __init__(
        self,
        model: ModelRunner,
        blocks: int,
        tokens: int,
        narrow: Narrow | None = None,
        layout: KVLayout = ONE_TABLE,
    ) -> None:
        self.model = model
        self.blocks, self.tokens, self.layout = blocks, tokens, layout
        self.cache = PagedCache(blocks, tokens, narrow, layout)
        #: Steps that are recorded, if any are.
        self.graphs: StepGraphs | None = None
        self._steps = [StepTables() for _ in layout.windows]
        #: Of rows that are nobody's.
        self._scratch = table_of(*[[blocks]] * len(layout.windows))

    def forward(self, parts: Sequence[Part], drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Compute, and write keys and values to the pool.

        Args:
            parts: Those of one token first.
            drawn: Tokens on the device, (tokens,), that are computed instead of those of the parts.

        Returns:
            Float32 logits, (wanted, vocabulary), in the order of the parts and their tokens.
        """
        shifts = [part.answer.shift for part in parts]
        if self.graphs is not None and all(map(_stepped, parts)):
            tables = [[part.tables.each[index].blocks for part in parts] for index in range(len(self._steps))]
            tokens = [part.tokens[0] for part in parts]
            logits = self.graphs.forward(tokens, [part.length for part in parts], tables, drawn, shifts)
            if logits is not None:
                return logits
        counts = [len(part.tokens) for part in parts]
        lengths = [part.length for part in parts]
        passes: list[PagedPass] = []
        spans = [part.spans for part in parts] if any(part.embedded for part in parts) else []
        spans = spans if any(spans) else []
        masks: dict[Any, torch.Tensor] = {}
        for index, step in enumerate(self._steps):
            its = [part.tables.each[index] for part in parts]
            blocks, runs = [table.blocks for table in its], [table.runs for table in its]
            passes.append(PagedPass(counts, lengths, blocks, self.tokens, runs, step, masks, spans))
        tokens = [token for part in parts for token in part.tokens]
        if passes[0].singles == len(parts):
            places = [length - 1 + shift for length, shift in zip(lengths, shifts, strict=True)]
        else:
            places = [
                place + shift
                for length, count, shift in zip(lengths, counts, shifts, strict=True)
                for place in range(length - count, length)
            ]
        adapters: list[Adapter | None] = []
        if any(part.answer.adapter is not None for part in parts):
            adapters = [part.answer.adapter for part, count in zip(parts, counts, strict=True) for _ in range(count)]
        with self._reading(parts, tokens):
            wanted = _wanted(parts, len(tokens))
            return self.model.packed(tokens, places, adapters, wanted, self.cache, passes, drawn)

    def _reading(self, parts: Sequence[Part], tokens: list[int]) -> AbstractContextManager[None]:
        """Within it tokens of prompts with pictures are what these are; and their numbers, which nobody reads, are ones that
        every model has."""
        vision = self.model.vision
        if vision is None or not any(part.embedded for part in parts):
            return nullcontext()
        inserts: list[Insert] = []
        at = 0
        for part in parts:
            count, embedded = len(part.tokens), part.embedded
            begin = part.length - count
            if embedded is not None and begin < embedded.tokens:
                end = min(part.length, embedded.tokens)
                inserts.append(Insert(at, begin, end, embedded))
                tokens[at : at + end - begin] = [0] * (end - begin)
            at += count
        return vision.reading(inserts)

    def probe(self) -> None:
        """A prompt and a step, in the block that is nobody's: what the model makes of any, if it is whole."""
        with torch.inference_mode():
            for count, length in ((8, 8), (1, 9)):
                self.forward([Part(_NOBODY, [0] * count, length, self._scratch, "last")])

    def warm_up(self) -> None:
        """Have what is made at first use there before the first request: compiled steps of one row, and of any number."""
        self.probe()
        if self.model.compiles_paged:
            with torch.inference_mode():
                for rows in (1, 2, 3):
                    self.forward([Part(_NOBODY, [0], 9, self._scratch, "last")] * rows)

    def record(self, rows_max: int, length_max: int, capture: Capture) -> None:
        """Record steps of up to so many rows, of so many tokens each. Errors as of `StepGraphs.record`."""
        with torch.inference_mode():
            graphs = StepGraphs(self.model, self.cache, rows_max=rows_max, length_max=length_max, capture=capture)
            graphs.record()
        self.graphs = graphs


def _stepped(part: Part) -> bool:
    """Whether it is as each part of a step that is recorded: of one token, whose logits are wanted, and of no adapter
    or picture."""
    plain = part.answer.adapter is None and part.embedded is None
    return len(part.tokens) == 1 and part.logits != "none" and plain


def _wanted(parts: Sequence[Part], tokens: int) -> list[int] | None:
    """Which tokens' logits are; None for those of all."""
    wanted: list[int] = []
    end = 0
    for part in parts:
        begin, end = end, end + len(part.tokens)
        if part.logits != "none":
            wanted += range(begin if part.logits == "all" else end - 1, end)
    return None if len(wanted) == tokens else wanted
