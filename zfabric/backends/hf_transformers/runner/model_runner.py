"""The forward pass: what a batch asks of a model, in the words that the model's class takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch

from zfabric.backends.front.images import PER_TOKEN
from zfabric.backends.hf_transformers.cache.kv_cache import KVCache
from zfabric.backends.hf_transformers.cache.own_states import state_cache_of
from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass
from zfabric.backends.hf_transformers.parameters.lora import Adapter, Lora
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.decoder_layers import short_decoder
from zfabric.backends.hf_transformers.runner.rope import Ropes
from zfabric.wire.payloads import GenerateRequest

if TYPE_CHECKING:
    from zfabric.backends.hf_transformers.runner.vision import Vision

_AS_IT_IS: Final = nullcontext()


#: Whose rows a warm-up computes.
_NOBODY: Final = [Answer(GenerateRequest()) for _ in range(4)]


class ModelRunner:
    """The forward pass of a decoder.

    Args:
        model: Of transformers, in evaluation mode.
        ropes: Positions of it whose frequencies depend on a text's length.
        compiled: Steps of the batch are compiled by torch. Prompts are not: their shapes are too many, and their passes
            too long for it to matter.

    Attributes:
        raw: The model of transformers.
        states: Whether layers keep a state of each row, beside keys and values of each token or instead of them.
        parts: Whether a prompt can be computed in parts, each from where the one before it has ended.
        pads: Whether prompts of different lengths can be computed together.
        row_cells: Cells of the cache that each row takes, however short.
        grows: Whether it takes another one with each token.
        vision: What sees pictures for it, if prompts with pictures are computed in parts.
    """

    def __init__(self, model: Any, ropes: Ropes | None = None, *, compiled: bool = False) -> None:
        self.raw = self._model = model
        self.ropes = ropes or None
        self._compiled: Any = torch.compile(model, dynamic=True) if compiled else None
        #: Whether its steps are over pages; only those, or only padded ones, are compiled.
        self.paged = False
        self.device = model.device
        self.lora = Lora(model)
        self._short = short_decoder(model)
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        #: What keeps the states of rows; None if layers have none.
        self.state_cache = state_cache_of(model.config)
        self.states = self.state_cache is not None
        # What a model with states can do is asked of it when it is loaded; every other one can do both.
        self.parts = self.pads = not self.states
        self.row_cells, self.grows = 0, True
        self.vision: Vision | None = None
        #: What it calls its cache.
        self.cache_name = "past_key_values" if "past_key_values" in self._accepted else "cache_params"
        #: Places images in the dimensions of a model that has several.
        self._rope_index: Any = getattr(getattr(model, "model", None), "get_rope_index", None)
        # One of four dimensions is taken as it is, so none is made; attention over pages makes its own.
        self._no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=model.device)
        #: Whether it is told each token's place.
        self.takes_positions = "position_ids" in self._accepted
        #: Whether it can be told whose logits are wanted.
        self._keeps = "logits_to_keep" in self._accepted
        known = model.get_input_embeddings()
        drawn = model.get_output_embeddings() or known
        #: Tokens that can be both read and drawn; some models have more of the one than of the other.
        self.vocabulary_size = min(int(known.weight.shape[0]), int(drawn.weight.shape[0]))
        #: Tokens that a prompt may have.
        self.read_vocabulary_size = self.vocabulary_size

    def start(self, answers: Sequence[Answer]) -> Any:
        """An empty cache for one row of each."""
        return KVCache() if self.state_cache is None else self.state_cache(self._model.config)

    def cells(self, columns: int) -> int:
        """Cells of the cache that a row of so many columns takes."""
        return self.row_cells + columns * self.grows

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        cache: Any,
        *,
        answers: Sequence[Answer] = (),
        wholes: Sequence[int] | None = None,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Append columns to a left-padded cache.

        Args:
            rows: Tokens to append, as many in each row; the first ones may be padding.
            lengths: Columns in use of each row afterwards; those to the left of them are padding.
            answers: What each row belongs to; empty if to none. Media are those of the first, and all in the first part.
            wholes: While prompts are computed, the columns in use of each row when its own is whole.

        Returns:
            Float32 logits of the last column, (rows, vocabulary), or of all, (rows, columns, vocabulary).
        """
        columns = len(rows[0])
        width = cache.get_seq_length() + columns
        mask, first = self._mask(lengths, width)
        if self.states and not cache.grows and columns < width:
            # Only attention looks at columns before these, and of these none is padding.
            mask = None
        arguments = self._arguments(rows, mask, cache)
        media = answers[0].media if answers and columns == width else None
        if media is not None:
            arguments |= self.sent(media, columns)
        seen = None if media is None else self.seen_positions(answers[0], arguments)
        if seen is not None:
            arguments["position_ids"] = seen
        elif self.takes_positions:
            arguments["position_ids"] = self._positions(answers, width - columns, width, first)
        if self._keeps and not all_logits:
            arguments["logits_to_keep"] = 1
        adapters = [answer.adapter for answer in answers]
        run = self._model
        if self._compiles_padded and columns == 1 and width > 2 and not any(adapters):
            # Nothing may move within a compiled step. For lengths of 0 and 1, and for a cache that is full to the last
            # column, another one would be made.
            cache.reserve(width + 1)
            run = self._compiled
        with self.lora.rows(adapters), self._turning(columns, lengths, answers, wholes):
            if self.states:
                arguments |= cache.given(self._model, self.cache_name)
            made = run(**arguments)
        if self.states:
            cache.taken(self._model, made)
            cache.passed = width
        logits = made.logits
        logits = (logits if all_logits else logits[:, -1])[..., : self.vocabulary_size].float()
        # Drawing needs float64, which MPS does not have.
        return logits.cpu() if logits.device.type == "mps" else logits

    def packed(
        self,
        tokens: Sequence[int],
        places: Sequence[int],
        adapters: Sequence[Adapter | None],
        wanted: Sequence[int] | None,
        cache: PagedCache,
        passes: Sequence[PagedPass],
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute tokens of several rows in one line, whose keys and values lie in blocks.

        Args:
            places: Of each token in its row.
            adapters: Of each token; empty for none at all.
            passes: Where they lie, by each table of their rows.
            wanted: Tokens whose logits are; None for all.
            drawn: The tokens, where they are on the device already.

        Returns:
            Float32 logits, (wanted, vocabulary).
        """
        # One at least is kept: a pass may end in the middle of every prompt. All in one copy to the device.
        last = [] if wanted is None else list(wanted) or [0]
        into = passes[0].slots() if len(passes) == 1 else [slot for passed in passes for slot in passed.slots()]
        sent = self.send([*tokens, *places, *into, *last])
        count = len(tokens)
        end = 2 * count + len(into)
        kept = sent[end:] if last else None
        with self.lora.rows(adapters), cache.during(passes, sent[2 * count : end].split(count)):
            compiled = kept is None and passes[0].singles == count and not adapters
            ids = sent[:count] if drawn is None else drawn
            logits = self.line(ids, sent[count : 2 * count], cache, kept, farthest=max(places), compiled=compiled)
        logits = (logits if kept is None else logits[: len(wanted or ())]).float()
        return logits.cpu() if logits.device.type == "mps" else logits

    def line(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        cache: PagedCache,
        kept: torch.Tensor | None = None,
        *,
        farthest: int | None = None,
        compiled: bool = False,
    ) -> torch.Tensor:
        """Compute tokens in one line, within `PagedCache.during`.

        Args:
            ids: (tokens,).
            places: Of each in its row, (tokens,).
            kept: Tokens whose logits are wanted; None for all.
            farthest: The largest place; None where the host does not know it, as in steps that are recorded.
            compiled: By compiled code, if there is any.

        Returns:
            Logits in the model's type, (wanted, vocabulary).
        """
        made = None
        if self._short is not None and farthest is not None:
            made = self._short(ids, places, farthest, cache, self._no_mask, kept)
        if made is None:
            made = self._line(ids, places, cache, kept, compiled=compiled)
        return made[:, : self.vocabulary_size] if made.shape[1] > self.vocabulary_size else made

    def _line(
        self, ids: torch.Tensor, places: torch.Tensor, cache: PagedCache, kept: torch.Tensor | None, *, compiled: bool
    ) -> torch.Tensor:
        """By the model's own forward."""
        arguments: dict[str, Any] = {
            "input_ids": ids.unsqueeze(0),
            "position_ids": places.unsqueeze(0),
            "attention_mask": self._no_mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if kept is not None and self._keeps:
            arguments["logits_to_keep"] = kept
        run = self._compiled if compiled and self.compiles_paged else self._model
        logits: torch.Tensor = run(**arguments).logits[0]
        return logits[kept] if kept is not None and not self._keeps else logits

    @property
    def switch(self) -> int | None:
        """A row that grows to so many columns has to be computed anew; None if none ever has."""
        return None if self.ropes is None else self.ropes.switch

    def _turning(
        self, columns: int, lengths: Sequence[int], answers: Sequence[Answer], wholes: Sequence[int] | None
    ) -> AbstractContextManager[None]:
        if self.ropes is None:
            return _AS_IT_IS
        prompts = [len(answer.prompt) for answer in answers] or list(lengths)
        return self.ropes.columns(self.ropes.lengths(columns, lengths, prompts, wholes))

    def probe(self) -> Any:
        """A prompt and a step: what the model makes of any, if it is whole. Returns the cache that it has filled."""
        with torch.inference_mode():
            cache = self._warm_cache()
            self([[0] * 8], [8], cache)
            self([[0]], [9], cache)
        return cache

    def warm_up(self) -> None:
        """Have what is made at first use there before the first request."""
        self.probe()
        if self._compiles_padded:
            with torch.inference_mode():
                self._warm_up_compiled()

    @property
    def compiles_paged(self) -> bool:
        """Whether steps over pages are compiled."""
        return self._compiled is not None and self.paged

    @property
    def _compiles_padded(self) -> bool:
        return self._compiled is not None and not self.paged

    def _warm_up_compiled(self) -> None:
        """Compile what steps are made of: one row and several, padded and not, each with numbers that differ."""
        for sizes in ((8,), (8, 8), (8, 8, 8), (8, 7), (8, 6, 7), (8, 5, 6, 7)):
            cache = KVCache()
            self([[0] * 8] * len(sizes), sizes, cache, answers=_NOBODY[: len(sizes)])
            for step in range(1, 4):
                lengths = [size + step for size in sizes]
                self([[0]] * len(sizes), lengths, cache, answers=_NOBODY[: len(sizes)])

    def _warm_cache(self) -> Any:
        return self.start(_NOBODY[:1])

    def _arguments(self, rows: Sequence[Sequence[int]], mask: torch.Tensor | None, cache: Any) -> dict[str, Any]:
        arguments = {"input_ids": self.send(rows), self.cache_name: cache, "use_cache": True}
        # Without padding there is no mask, which takes the quicker attention kernels.
        return arguments if mask is None else {**arguments, "attention_mask": mask}

    def _positions(self, answers: Sequence[Answer], begin: int, end: int, first: torch.Tensor | None) -> torch.Tensor:
        """Of the columns, (rows, columns): from the first in use, and by as much less as images take less than columns."""
        places = torch.arange(begin, end, device=self.device).unsqueeze(0)
        if first is not None:
            places = (places - first).clamp_(min=0)
        if any(answer.shift for answer in answers):
            places = places + self.send([answer.shift for answer in answers]).unsqueeze(1)
        return places.expand(max(1, len(answers)), -1)

    def seen_positions(self, answer: Answer, arguments: dict[str, Any]) -> torch.Tensor | None:
        """Of a prompt with images that have a height and a width, (3, 1, columns), and `answer.shift` is set for what follows;
        None if they have none."""
        if self._rope_index is None:
            return None
        names = inspect.signature(self._rope_index).parameters.keys() & arguments.keys()
        chosen = {name: arguments[name] for name in names if name != "attention_mask"}
        positions, shift = self._rope_index(**chosen)
        answer.shift = int(shift.item())
        found: torch.Tensor = positions
        return found

    def _mask(self, lengths: Sequence[int], width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which columns are in use, and the first of each row; None if there is no padding."""
        if min(lengths) == width:
            return None, None
        first = self.send([width - length for length in lengths]).unsqueeze(1)
        return (torch.arange(width, device=self.device).unsqueeze(0) >= first).long(), first

    def sent(self, media: Mapping[str, Any], columns: int = 0) -> dict[str, Any]:
        """Media on the device, in the model's own type; what has an entry per token has one for each column."""
        sent: dict[str, Any] = {}
        for name in media.keys() & self._accepted:
            value = media[name]
            tensor = value.to(self._model.dtype) if torch.is_floating_point(value) else value
            if name.endswith(PER_TOKEN):
                tensor = torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1]))
            sent[name] = tensor.to(self.device)
        return sent

    def send(self, values: Any) -> torch.Tensor:
        """Whole numbers on the device."""
        tensor = torch.tensor(values, dtype=torch.long)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)
