"""The running batch: a left-padded key-value cache that sequences join and leave between two steps.

Left padding keeps every row's newest token in the last column, so one step appends one column for all. A row that joins
is padded to the batch's length, or the batch to the row's; columns that no row uses any more are cut off when rows leave.
Lengths are known to the host, so nothing here waits for a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Many
from typing import Any

import torch

from zfabric.backends.hf_transformers.cache import new_cache
from zfabric.backends.hf_transformers.sequence import Sequence


class Model:
    """The forward pass of a causal language model, with the arguments that its class takes.

    Args:
        model: Of transformers, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = model.device
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted
        embeddings = model.get_output_embeddings() or model.get_input_embeddings()
        self.vocabulary_size = int(embeddings.weight.shape[0])

    def __call__(
        self, rows: Many[Many[int]], lengths: Many[int], cache: Any, *, all_logits: bool = False
    ) -> torch.Tensor:
        """Append columns to a left-padded cache.

        Args:
            rows: Tokens to append, as many in each row; the first ones may be padding.
            lengths: Columns in use of each row afterwards; those to the left of them are padding.

        Returns:
            Float32 logits of the last column, (rows, vocabulary), or of all, (rows, columns, vocabulary).
        """
        columns = len(rows[0])
        width = cache.get_seq_length() + columns
        arguments: dict[str, Any] = {"input_ids": self._send(rows), "past_key_values": cache, "use_cache": True}
        if min(lengths) < width:
            first = self._send([width - length for length in lengths]).unsqueeze(1)
            places = torch.arange(width, device=self.device).unsqueeze(0)
            # Without padding there is no mask, which takes the quicker attention kernels.
            arguments["attention_mask"] = (places >= first).long()
            positions = (places[:, width - columns :] - first).clamp_(min=0)
        else:
            positions = torch.arange(width - columns, width, device=self.device).expand(len(rows), -1)
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self._takes_keep and not all_logits:
            arguments["logits_to_keep"] = 1
        logits = self._model(**arguments).logits
        logits = (logits if all_logits else logits[:, -1]).float()
        # Drawing needs float64, which MPS does not have.
        return logits.cpu() if logits.device.type == "mps" else logits

    def warm_up(self) -> None:
        """A prompt and a step, so that what is made at first use is there before the first request."""
        with torch.inference_mode():
            cache = new_cache()
            self([[0] * 8], [8], cache)
            self([[0]], [9], cache)

    def _send(self, values: Any) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=torch.long)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


class Batch:
    """Rows, their cache, and the forward pass of one step.

    A step is `forward`, then `commit` with the tokens that were drawn, or `rollback` when it failed.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.rows: list[Sequence] = []
        self.width = 0
        self._tokens: list[int] = []
        self._lengths: list[int] = []
        self._cache: Any = None

    def cells(self, more_rows: int = 0, width: int = 0) -> int:
        """Cells of the cache in use, padding included, if so many rows of such a width joined."""
        return (len(self.rows) + more_rows) * max(self.width, width)

    def join(self, rows: Many[Sequence], cache: Any, lengths: Many[int], tokens: Many[int]) -> None:
        """Add prefilled rows.

        Args:
            cache: Of these rows, left-padded.
            lengths: Columns in use of each.
            tokens: The token that each row is to be fed next.
        """
        if not self.rows:
            self._cache = cache
            self.width = cache.get_seq_length()
        else:
            self._merge(cache)
            self.width = max(self.width, cache.get_seq_length())
        self.rows.extend(rows)
        self._lengths.extend(lengths)
        self._tokens.extend(tokens)

    def _merge(self, cache: Any) -> None:
        """Merge all layers, or none if the memory does not suffice."""
        merged: list[Any] = []
        try:
            for mine, other in zip(self._cache.layers, cache.layers, strict=True):
                mine.merge(other)
                merged.append(mine)
        except RuntimeError:
            for layer in merged:
                layer.undo_merge(len(self.rows), self.width)
            raise

    def leave(self, keep: list[int]) -> None:
        """Go on with these rows only."""
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in keep]
        self._tokens = [self._tokens[index] for index in keep]
        self._lengths = [self._lengths[index] for index in keep]
        if not keep:
            self._cache = None
            self.width = 0
            return
        unused = self.width - max(self._lengths)
        for layer in self._cache.layers:
            layer.select(keep, unused)
        self.width -= unused

    def forward(self) -> torch.Tensor:
        """Feed each row its token. Returns float32 logits (rows, vocabulary)."""
        return self._model([[token] for token in self._tokens], [length + 1 for length in self._lengths], self._cache)

    def commit(self, tokens: Many[int]) -> None:
        """The step succeeded, and drew these tokens."""
        self._tokens = list(tokens)
        self._lengths = [length + 1 for length in self._lengths]
        self.width += 1

    def rollback(self) -> None:
        """The step failed: forget what some layers had appended already."""
        for layer in self._cache.layers:
            layer.crop_to(self.width)


class Prefill:
    """Prompts on their way into the batch: several short ones in one pass, or one long one, a part at a time.

    Args:
        groups: Choices that start from the same tokens; groups start from different ones.
    """

    def __init__(self, model: Model, groups: list[list[Sequence]]) -> None:
        self._model = model
        self.groups = groups
        self.prompts = [group[0].tokens() for group in groups]
        self.done = 0
        self.cache: Any = new_cache()

    @property
    def rows(self) -> list[Sequence]:
        """All choices."""
        return [sequence for group in self.groups for sequence in group]

    @property
    def width(self) -> int:
        """Columns of the longest prompt."""
        return max(len(prompt) for prompt in self.prompts)

    @property
    def left(self) -> int:
        """Columns still to compute."""
        return self.width - self.done

    def advance(self, columns_max: int, *, all_logits: bool = False) -> torch.Tensor:
        """Compute up to so many columns; all at once if there are several prompts.

        Returns:
            Float32 logits of the last column, (groups, vocabulary), or of all, (groups, columns, vocabulary).
        """
        width = self.width
        end = width if len(self.prompts) > 1 else min(width, self.done + columns_max)
        if len(self.prompts) == 1:
            part, lengths = [self.prompts[0][self.done : end]], [end]
        else:
            part = [[0] * (width - len(prompt)) + prompt for prompt in self.prompts]
            lengths = [len(prompt) for prompt in self.prompts]
        logits = self._model(part, lengths, self.cache, all_logits=all_logits)
        self.done = end
        return logits

    def spread(self, keep: list[int]) -> tuple[Any, list[int]]:
        """The cache and the lengths of these of all choices, each with a row of its own."""
        owners = [number for number, group in enumerate(self.groups) for _ in group]
        chosen = [owners[index] for index in keep]
        if chosen != list(range(len(self.groups))):
            for layer in self.cache.layers:
                layer.select(chosen, 0)
        return self.cache, [len(self.prompts[number]) for number in chosen]
