"""Requests for all that is no text: vectors, tokens, scores and classes, and their results."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from zfabric.errors import RequestError
from zfabric.limits import DIMENSIONS_MAX
from zfabric.wire.sampling import out_of_range


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

    def validate(self) -> None:
        """Raises: RequestError for no inputs, ParameterRangeError."""
        if not self.inputs:
            raise RequestError("inputs is empty, one text at least is needed", parameter="inputs")
        if self.dimensions is not None and not 1 <= self.dimensions <= DIMENSIONS_MAX:
            raise out_of_range("dimensions", self.dimensions, f"1 … {DIMENSIONS_MAX}")


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
    """Texts to be put in classes. The result is an array for each text, of the probability of each class.

    Attributes:
        inputs: Texts.
        model: Set by the worker from the DISPATCH.
        request_id: Set by the worker: the attempt's name in its logs.
        priority: Set by the worker from the DISPATCH; of what waits, the lowest number is served first.
        deadline_ms: Set by the worker from the DISPATCH: what is left in milliseconds, None for no deadline.
    """

    inputs: list[str]
    model: str = ""
    request_id: str = ""
    priority: int = 0
    deadline_ms: int | None = None

    def validate(self) -> None:
        """Raises: RequestError for no texts."""
        if not self.inputs:
            raise RequestError("inputs is empty, one text at least is needed", parameter="inputs")
