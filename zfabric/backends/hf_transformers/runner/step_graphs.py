"""Steps of the running rows over buffers that never move: on a CUDA device each size is recorded once, as a graph, and a step of
it is then one launch, without Python for each kernel.

A step has few sizes: rows are rounded up, and those nobody has write to the block that is nobody's. What differs from step to
step, tokens, places and tables, is written to one buffer of the host and copied at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from typing import Any, Final

import numpy as np
import torch

from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.cache.static_pass import StaticPass
from zfabric.backends.hf_transformers.runner.capture_check import checked
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner

#: Sizes up to here are doubled, and beyond it so much is added: a row too many costs less than another graph.
_ROWS_DOUBLED: Final = 8
#: Where tables are gathered, all of a size's places are read, so there are sizes of these as well, in blocks. Steps of longer
#: rows are computed as ever: copying their keys takes longer than launching anyway.
_WIDTHS: Final = (1, 4, 16)
#: Passes before one is recorded: kernels are chosen, and their workspaces made, at first use.
_WARM_UPS: Final = 2
#: What is told of each row: token, place and length, and a slot in each of its tables.
_FIELDS: Final = 3

#: Records a function of no arguments; what it returns does the same again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def plain(run: Callable[[], None]) -> Callable[[], None]:
    """No recording: the same function on the same buffers."""
    return run


class CudaCapture:
    """Records graphs of one device, which share their memory: only one is played at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record it."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile, such as one that reads weights.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        replay: Callable[[], None] = graph.replay
        return replay


def capture_of(device: torch.device) -> Capture | None:
    """What records steps of a device; None if nothing does."""
    return CudaCapture(device) if device.type == "cuda" else None


def row_sizes(most: int) -> list[int]:
    """Rows that steps are rounded up to, from one to so many."""
    doubled = [1 << power for power in range(_ROWS_DOUBLED.bit_length())]
    return [*(size for size in (*doubled, *range(2 * _ROWS_DOUBLED, most, _ROWS_DOUBLED)) if size < most), most]


def widths(longest: int, *, by_tables: bool) -> list[int]:
    """Blocks that rows are rounded up to, where the longest has so many."""
    if by_tables:
        # The kernel reads what a row has, however wide its table is.
        return [longest]
    return [*(size for size in _WIDTHS if size < longest), *[longest] * (longest <= _WIDTHS[-1])]


class StepGraphs:
    """Steps of rows whose newest tokens alone are computed. Belongs to the thread that runs the model.

    Args:
        model: Its forward pass.
        cache: Written to before: all layers have their pool.
        rows_max: Rows of the largest step.
        length_max: Tokens of the longest row.
        capture: What records a step.

    Attributes:
        buffer: Logits of the newest step, float32, (rows_max, vocabulary).
        bytes: Memory of the device that buffers and graphs took.
    """

    def __init__(
        self, model: ModelRunner, cache: PagedCache, *, rows_max: int, length_max: int, capture: Capture
    ) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._free = _free_bytes(model.device)
        self._rows = row_sizes(rows_max)
        by_tables = cache.by_tables()
        self._widths = widths(-(-length_max // cache.tokens), by_tables=by_tables)
        # Of gathered rows no more is copied than there could be without sharing.
        self._blocks_max = None if by_tables else cache.scratch
        device, width = model.device, self._widths[-1]
        self._count = len(cache.layout.windows)
        numbers = rows_max * (_FIELDS + self._count * (1 + width))
        self._host = torch.zeros(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._sent = torch.zeros(numbers, dtype=torch.int32, device=device)
        self._ends = torch.arange(rows_max + 1, dtype=torch.int32, device=device)
        self._places = torch.arange(width * cache.tokens, dtype=torch.int32, device=device)
        self.buffer = torch.zeros((rows_max, model.vocabulary_size), dtype=torch.float32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._graphs: dict[tuple[int, int], Callable[[], None]] = {}
        self._before = [_Tables() for _ in range(self._count)]
        self.bytes = 0

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Those that are recorded, as rows and blocks of each."""
        return sorted(self._graphs)

    def record(self) -> None:
        """Record all sizes, the largest first, whose memory the others find.

        Raises:
            NotImplementedError: The model computes what cannot be recorded.
            RuntimeError: The device refuses it, or has no memory left.
        """
        for width in reversed(self._widths):
            for rows in reversed(self._rows):
                if self._blocks_max is None or rows * width <= max(self._blocks_max, width):
                    self._graphs[rows, width] = self._recorded(rows, width)
        self.bytes = max(0, self._free - _free_bytes(self._sent.device))

    def forward(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        drawn: torch.Tensor | None = None,
        shifts: Sequence[int] = (),
    ) -> torch.Tensor | None:
        """Compute a step, and write keys and values to the pool.

        Args:
            tokens: The newest of each row.
            lengths: Of each row afterwards.
            tables: Blocks of each, by each table of a row.
            drawn: The tokens, where they are on the device already.
            shifts: By how much the place of each is off from its row's length; empty for none.

        Returns:
            Float32 logits, (rows, vocabulary), until the next step; None if there is no such size.
        """
        rows = next((size for size in self._rows if size >= len(tokens)), 0)
        blocks = -(-max(lengths) // self._cache.tokens)
        width = next((size for size in self._widths if size >= blocks), 0)
        replay = self._graphs.get((rows, width))
        if replay is None:
            return None
        self._send(rows, width, tokens, lengths, tables, shifts)
        if drawn is not None:
            self._sent[: len(tokens)].copy_(drawn)
        replay()
        return self.buffer[: len(tokens)]

    def _recorded(self, rows: int, width: int) -> Callable[[], None]:
        self._send(rows, width, [0], [1], [[[self._cache.scratch]]] * self._count)
        # What is compiled is of the same operations.
        checked(partial(self._run, rows, width, compiled=False), self._sent.device)
        return self._capture(partial(self._run, rows, width))

    def _run(self, rows: int, width: int, *, compiled: bool = True) -> None:
        """What is recorded: all that it reads lies in buffers, and so does what it makes."""
        sent, count = self._sent, self._count
        end = rows * (_FIELDS + count)
        lengths = sent[2 * rows : 3 * rows]
        ids, places = sent[: 2 * rows].to(torch.int64).view(2, rows)
        slots = sent[3 * rows : end].to(torch.int64).view(count, rows)
        tables = sent[end : end + count * rows * width].view(count, rows, width)
        numbers = self._places[: width * self._cache.tokens]
        passes = [StaticPass(lengths, its, self._ends[: rows + 1], numbers) for its in tables.unbind()]
        with self._cache.during(passes, slots.unbind()):
            self.buffer[:rows].copy_(self._model.line(ids, places, self._cache, compiled=compiled))

    def _send(
        self,
        rows: int,
        width: int,
        tokens: Sequence[int],
        lengths: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        shifts: Sequence[int] = (),
    ) -> None:
        """Have a step's numbers on the device; tables if they have changed."""
        if self._copied is not None:
            # What was copied last may still be on its way.
            self._copied.synchronize()
        count, size, scratch = len(tokens), self._cache.tokens, self._cache.scratch
        end = rows * (_FIELDS + self._count)
        numbers = self._host.numpy()
        matrices = numbers[end : end + self._count * rows * width].reshape(self._count, rows, width)
        fields = numbers[:end].reshape(_FIELDS + self._count, rows)
        after = np.array(lengths, dtype=np.int32)
        places = after - 1
        fields[:_FIELDS, :count] = (tokens, places + np.array(shifts, dtype=np.int32) if shifts else places, after)
        fields[:_FIELDS, count:] = [[0], [0], [1]]
        fields[_FIELDS:, count:] = scratch * size
        changed = False
        for slots, matrix, before, its in zip(fields[_FIELDS:], matrices, self._before, tables, strict=True):
            changed |= before.write(matrix, its, scratch)
            slots[:count] = matrix[np.arange(count), places // size] * size + places % size
        end += matrices.size * changed
        self._sent[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return int(torch.cuda.mem_get_info(device)[0])


class _Tables:
    """Blocks of the step before in the buffer of the host: tables are lists that nothing but grows."""

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._tables: list[Sequence[int]] = []
        self._counts: list[int] = []

    def write(self, matrix: Any, tables: Sequence[Sequence[int]], scratch: int) -> bool:
        """Write those of a step below one another, and the block that is nobody's behind them. Returns whether any have
        changed."""
        counts = [len(table) for table in tables]
        same = matrix.shape == self._shape and len(tables) == len(self._tables) and all(map(is_, tables, self._tables))
        if same and counts == self._counts:
            return False
        width = matrix.shape[1]
        if not same:
            matrix.fill(scratch)
        for row, (table, count) in enumerate(zip(tables, counts, strict=True)):
            before = self._counts[row] if same else 0
            if before < min(count, width):
                matrix[row, before : min(count, width)] = table[before:width]
        self._shape, self._tables, self._counts = matrix.shape, list(tables), counts
        return True
