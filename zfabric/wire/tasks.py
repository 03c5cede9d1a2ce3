"""Requests for all that is no text: vectors, tokens, scores, classes and rewards, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct

from zfabric.errors import RequestError
from zfabric.limits import DIMENSIONS_MAX
from zfabric.wire.chat import Message
from zfabric.wire.sampling import out_of_range

#: Texts that are judged together.
_PAIR: Final = 2


class EmbedRequest(Struct, array_like=True, kw_only=True):
    """Texts (or token ids) to embed.

    Attributes:
        inputs: Texts, or lists of token ids.
        dimensions: Cut vectors to so many values (models trained for it), 1 … 65,536; None for all.
        normalize: Give vectors of length 1.
        truncate: What to do with an input beyond the context: "error", "cut" or "chunk" (mean of its pieces).
        pooling: None is the model's own; else "mean", "cls" or "last".
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH.
        deadline_ms: Set by the worker from the DISPATCH.
        prompt_name: Which of the model's own prompts is put before each text; None for the one that it uses by default.
    """

    inputs: list[str | list[int]]
    dimensions: int | None = None
    normalize: bool = True
    truncate: Literal["error", "cut", "chunk"] = "error"
    pooling: Literal["mean", "cls", "last"] | None = None
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None
    prompt_name: str | None = None

    def validate(self) -> None:
        """Raises: RequestError for no inputs, ParameterRangeError."""
        _check_inputs(self.inputs, self.dimensions)


class EmbedResult(Struct, array_like=True):
    """Vectors as one buffer.

    Attributes:
        rows: How many, one for each input.
        dimensions: Values of each.
        data: float32, little-endian, one row after the other.
    """

    rows: int
    dimensions: int
    data: bytes


class EmbedTokensRequest(Struct, array_like=True, kw_only=True):
    """Texts (or token ids), each token of which gets a vector: what late interaction compares.

    Attributes:
        inputs: Texts, or lists of token ids.
        dimensions: Cut vectors to so many values (models trained for it), 1 … 65,536; None for all.
        normalize: Give vectors of length 1.
        truncate: What to do with an input beyond the context: "error" or "cut".
        prompt_name: Which of the model's own prompts is put before each text; None for the one that it uses by default.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH; of what waits, the lowest number is served first.
        deadline_ms: Set by the worker from the DISPATCH: what is left in milliseconds, None for no deadline.
    """

    inputs: list[str | list[int]]
    dimensions: int | None = None
    normalize: bool = True
    truncate: Literal["error", "cut"] = "error"
    prompt_name: str | None = None
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for no inputs, ParameterRangeError."""
        _check_inputs(self.inputs, self.dimensions)


class EmbedTokensResult(Struct, array_like=True):
    """Vectors of tokens as one buffer.

    Attributes:
        tokens: How many vectors each input has.
        dimensions: Values of each.
        data: float32, little-endian, one vector after the other, one input after the other.
    """

    tokens: list[int]
    dimensions: int
    data: bytes


class DetokenizeRequest(Struct, array_like=True, kw_only=True):
    """Tokens whose text is wanted. The result is a text.

    Attributes:
        token_ids: Of the model's vocabulary.
        skip_special_tokens: Leave special tokens out of the text.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH; of what waits, the lowest number is served first.
        deadline_ms: Set by the worker from the DISPATCH: what is left in milliseconds, None for no deadline.
    """

    token_ids: list[int]
    skip_special_tokens: bool = False
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for no tokens."""
        if not self.token_ids:
            raise RequestError("token_ids is empty, one token at least is needed", parameter="token_ids")


class ScoreRequest(Struct, array_like=True, kw_only=True):
    """Documents to be compared with a query. The result is a number for each, in their order; the greatest fits best.

    Attributes:
        query: Text.
        documents: Texts.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH; of what waits, the lowest number is served first.
        deadline_ms: Set by the worker from the DISPATCH: what is left in milliseconds, None for no deadline.
    """

    query: str
    documents: list[str]
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for no documents."""
        if not self.documents:
            raise RequestError("documents is empty, one text at least is needed", parameter="documents")


class ClassifyRequest(Struct, array_like=True, kw_only=True):
    """Texts to be put in classes.

    Attributes:
        inputs: Texts, or pairs of texts that are judged together, each a list of two.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH; of what waits, the lowest number is served first.
        deadline_ms: Set by the worker from the DISPATCH: what is left in milliseconds, None for no deadline.
    """

    inputs: list[str | list[str]]
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for no texts, or for a list that is no pair."""
        _check_inputs(self.inputs)
        for at, given in enumerate(self.inputs):
            if not isinstance(given, str) and len(given) != _PAIR:
                raise RequestError(f"inputs[{at}] is a list of {len(given)} texts, a pair has 2", parameter="inputs")


class ClassifyResult(Struct):
    """What each text is. The array of probabilities is the result, and the names are the outcome's `labels`.

    Attributes:
        probabilities: A list for each text, of the probability of each class.
        labels: What the classes are called, in their order; empty where that is not known.
    """

    probabilities: list[list[float]]
    labels: list[str] = []


class RewardRequest(Struct, array_like=True, kw_only=True):
    """Texts or chats whose worth a reward model judges. The result is an array of numbers for each: one for the whole, or one
    for each token or step where the model judges those.

    Attributes:
        inputs: Texts, or lists of chat messages, which go through the model's chat template.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH; of what waits, the lowest number is served first.
        deadline_ms: Set by the worker from the DISPATCH: what is left in milliseconds, None for no deadline.
    """

    inputs: list[str | list[Message]]
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for no inputs, or for one that is empty."""
        _check_inputs(self.inputs)
        for at, given in enumerate(self.inputs):
            if not given:
                raise RequestError(f"inputs[{at}] is empty", parameter="inputs")


def _check_inputs(inputs: Sequence[object], dimensions: int | None = None) -> None:
    if not inputs:
        raise RequestError("inputs is empty, one text at least is needed", parameter="inputs")
    if dimensions is not None and not 1 <= dimensions <= DIMENSIONS_MAX:
        raise out_of_range("dimensions", dimensions, f"1 … {DIMENSIONS_MAX}")
