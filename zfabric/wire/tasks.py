"""Requests for what tokenizers and pooling models make, and their results."""

from __future__ import annotations

from msgspec import Struct

from zfabric.errors import RequestError


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
