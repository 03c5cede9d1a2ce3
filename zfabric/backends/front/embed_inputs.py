"""From the inputs of a request for vectors to tokens that fit the context: prompts, cutting, chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zfabric.backends.front.bounds import input_overflow, known_tokens, text_to_embed
from zfabric.errors import ParameterRangeError, RequestError
from zfabric.wire.tasks import EmbedRequest, EmbedResult, EmbedTokensRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that become one vector.

    Attributes:
        owner: The input that they belong to.
        prompt: How many of them, at the beginning, are the model's own prompt, special tokens before it included.
        types: Which of two texts each is of, for models that tell those apart.
    """

    tokens: list[int]
    owner: int
    prompt: int = 0
    types: list[int] | None = None


class EmbedInputs:
    """Makes pieces.

    Each piece of a text begins and ends with the special tokens that the whole has. Tokens that a caller gave are taken
    as they are: no prompt is put before them.

    Args:
        encode: A text's tokens, and for each whether the tokenizer added it (1) or it is of the text (0).
        context_length: Tokens of one piece.
        vocabulary_size: Tokens that the model has vectors for.
        prompts: The model's own, by their names.
        prompt_name: Of the one that is put before each text unless another is asked for.
        longest: Characters of the longest token; without it all of a text is read before it is refused or cut.
    """

    def __init__(
        self,
        encode: Callable[[str], tuple[list[int], list[int]]],
        *,
        context_length: int,
        vocabulary_size: int,
        prompts: Mapping[str, str] | None = None,
        prompt_name: str | None = None,
        longest: int | None = None,
    ) -> None:
        self._encode = encode
        self._longest = longest
        self._context_length = context_length
        self._vocabulary_size = vocabulary_size
        self._prompts = dict(prompts or {})
        self._prompt_name = prompt_name

    def pieces(self, request: EmbedRequest | EmbedTokensRequest) -> list[Piece]:
        """Those of all inputs, in order.

        Raises:
            ParameterRangeError: The model has no prompt of the name that is asked for.
            ContextOverflowError: An input is too long, and may be neither cut nor chunked.
            RequestError: An input has no tokens, or has some that the model does not know.
        """
        if request.prompt_name is not None:
            check_prompt_name(request.prompt_name, self._prompts)
        prompt = self._prompts.get(request.prompt_name or self._prompt_name or "", "")
        prompt_tokens = self._tokens_of(prompt) if prompt else 0
        found: list[Piece] = []
        for owner, given in enumerate(request.inputs):
            if request.prompt_name is not None and not isinstance(given, str):
                raise RequestError(f"prompt_name goes with texts, input {owner} is tokens", parameter="prompt_name")
            found += self._split(given, owner, request.truncate, prompt, prompt_tokens)
        return found

    def _tokens_of(self, prompt: str) -> int:
        """Tokens of the prompt alone, without what ends a text."""
        tokens, added = self._encode(prompt)
        return len(tokens) - (0 if 0 not in added else added[::-1].index(0))

    def _split(
        self, given: str | list[int], owner: int, truncate: str, before_it: str, prompt_tokens: int
    ) -> list[Piece]:
        before = after = prompt = 0
        if isinstance(given, str):
            if self._longest is not None:
                given = text_to_embed(given, owner, self._longest, self._context_length, truncate)
            tokens, added = self._encode(before_it + given)
            before = added.index(0) if 0 in added else 0
            after = added[::-1].index(0) if 0 in added else 0
            prompt = prompt_tokens
        else:
            tokens = given
        if not tokens:
            raise RequestError(f"input {owner} has no tokens", input=owner)
        tokens = known_tokens(tokens, self._vocabulary_size)
        limit = self._context_length
        if len(tokens) <= limit:
            return [Piece(tokens, owner, min(prompt, len(tokens) - 1))]
        if truncate == "error":
            raise input_overflow(owner, len(tokens), limit)
        begin, body, end = tokens[:before], tokens[before : len(tokens) - after], tokens[len(tokens) - after :]
        size = max(1, limit - before - after)
        count = 1 if truncate == "cut" else -(-len(body) // size)
        parts = [[*begin, *body[size * part : size * (part + 1)], *end] for part in range(count)]
        return [Piece(part, owner, 0 if number else min(prompt, limit - 1)) for number, part in enumerate(parts)]


def check_prompt_name(name: str, prompts: Mapping[str, str]) -> None:
    """Raises: ParameterRangeError: A model with these prompts has none of that name."""
    if name not in prompts:
        known = f"one of {', '.join(sorted(prompts))}" if prompts else "unset, since the model has none"
        raise ParameterRangeError(f"prompt_name is {name!r}, it must be {known}", parameter="prompt_name", value=name)


def told_prompts(prompts: Mapping[str, str], prompt_name: str | None) -> dict[str, str]:
    """What a model's details say of its prompts."""
    told = {"prompts": ", ".join(sorted(prompts))} if prompts else {}
    return {**told, "prompt_name": prompt_name} if prompt_name in prompts and prompt_name else told


def with_special_tokens(tokenizer: Any, *, lower_case: bool = False) -> Callable[[str], tuple[list[int], list[int]]]:
    """How a tokenizer of transformers encodes for `EmbedInputs`."""

    def encode(text: str) -> tuple[list[int], list[int]]:
        encoded = tokenizer(text.lower() if lower_case else text, return_special_tokens_mask=True, verbose=False)
        return list(encoded["input_ids"]), list(encoded["special_tokens_mask"])

    return encode


def cosines(result: EmbedResult) -> list[float]:
    """How well each row fits the first one. Rows have length 1."""
    import numpy as np

    matrix = np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)
    return [float(value) for value in matrix[1:] @ matrix[0]]


def owners(pieces: Sequence[Piece]) -> list[int]:
    """The input that each piece belongs to."""
    return [piece.owner for piece in pieces]
