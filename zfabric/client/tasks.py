"""What a client asks a model, or a worker, that has one answer and no stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from zfabric.client import values
from zfabric.client.connection import Connection
from zfabric.client.options import EmbedOptions, EmbedTokensOptions, Messages, SharedOptions, TemplateOptions
from zfabric.client.requests import (
    classify_request,
    count_request,
    detokenize_request,
    embed_request,
    embed_tokens_request,
    model_name,
    operate_request,
    reward_request,
    score_request,
    token_vectors,
    vectors,
)
from zfabric.client.results import Classification
from zfabric.errors import ProtocolError
from zfabric.wire import codec
from zfabric.wire.answers import Outcome
from zfabric.wire.tasks import EmbedResult, EmbedTokensResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class AsyncTasks:
    """Requests whose answer comes whole. Cancelling the task that waits cancels the request."""

    _connection: Connection

    async def embed(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[EmbedOptions],
    ) -> NDArray[np.float32]:
        """Vectors of texts. Cancelling the task cancels the request.

        Args:
            inputs: Texts, or lists of token ids; one text is one row.
            **options: See `EmbedOptions`.

        Returns:
            float32 array of shape (len(inputs), dimensions), a read-only view of the received buffer.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> vectors = await client.embed("minilm", ["one text", "another"], truncate="cut", timeout=10)
            >>> vectors.shape
            (2, 384)
        """
        request, submit = embed_request(inputs, options)
        answer, _ = await self._connection.call("embed", request, model=model_name(model), **submit)
        return vectors(_result(answer.outcome, EmbedResult), len(request.inputs))

    async def embed_tokens(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[EmbedTokensOptions],
    ) -> list[NDArray[np.float32]]:
        """A vector of each token of texts, for late interaction. Cancelling the task cancels the request.

        Args:
            inputs: Texts, or lists of token ids; one text is one array.
            **options: See `EmbedTokensOptions`.

        Returns:
            For each input a float32 array of shape (tokens, dimensions), special tokens included, a read-only view.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> query, document = await client.embed_tokens("colbert", ["What is a cat?", "A pet."])
            >>> score = (query @ document.T).max(axis=1).sum()
        """
        request, submit = embed_tokens_request(inputs, options)
        answer, _ = await self._connection.call("embed_tokens", request, model=model_name(model), **submit)
        return token_vectors(_result(answer.outcome, EmbedTokensResult), len(request.inputs))

    async def count_tokens(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **template: Unpack[TemplateOptions],
    ) -> int:
        """Tokens of a prompt, as `stream` would use them. Cancelling the task cancels the request.

        Args:
            timeout: Seconds; None is two minutes.
            **template: Tools, and what else the template is told, as of `stream`.

        Raises:
            FabricError: What ended the request; DeadlineExceededError when the time is over.

        Example:
            >>> await client.count_tokens("smollm2", "Once upon a time")
            4
        """
        request, submit = count_request(prompt, messages, timeout, template)
        answer, _ = await self._connection.call("count_tokens", request, model=model_name(model), **submit)
        return _result(answer.outcome, int)

    async def tokenize(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **template: Unpack[TemplateOptions],
    ) -> list[int]:
        """The tokens of a prompt, as `stream` would use them. Arguments and errors as of `count_tokens`.

        Example:
            >>> await client.tokenize("smollm2", "Once upon a time")
            [6403, 3698, 253, 655]
        """
        request, submit = count_request(prompt, messages, timeout, template)
        answer, _ = await self._connection.call("tokenize", request, model=model_name(model), **submit)
        return _result(answer.outcome, list[int])

    async def detokenize(
        self, model: str, token_ids: Sequence[int], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """The text of tokens. Cancelling the task cancels the request.

        Args:
            timeout: Seconds; None is two minutes.

        Raises:
            FabricError: What ended the request; DeadlineExceededError when the time is over.

        Example:
            >>> await client.detokenize("smollm2", [6403, 3698])
            'Once upon'
        """
        request, submit = detokenize_request(token_ids, skip_special_tokens, timeout)
        answer, _ = await self._connection.call("detokenize", request, model=model_name(model), **submit)
        return _result(answer.outcome, str)

    async def score(
        self, model: str, query: str, documents: str | Sequence[str], **options: Unpack[SharedOptions]
    ) -> list[float]:
        """How well each document fits a query: by a cross-encoder, or by the angle of vectors. Cancelling the task cancels
        the request.

        Returns:
            A number for each document, in their order; the greatest fits best.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> scores = await client.score("reranker", "What is a cat?", ["A pet.", "A stone."])
        """
        request, submit = score_request(query, documents, options)
        answer, _ = await self._connection.call("score", request, model=model_name(model), **submit)
        return _counted(_result(answer.outcome, list[float]), len(request.documents))

    async def rerank(
        self,
        model: str,
        query: str,
        documents: str | Sequence[str],
        *,
        top_n: int | None = None,
        **options: Unpack[SharedOptions],
    ) -> list[tuple[int, float]]:
        """The documents that fit a query best: `score`, sorted.

        Args:
            top_n: How many at most; None for all.

        Returns:
            (position in `documents`, score), the best one first.

        Raises:
            FabricError: As `score`.

        Example:
            >>> [(best, score), *rest] = await client.rerank("reranker", "What is a cat?", ["A pet.", "A stone."])
        """
        most = None if top_n is None else values.whole("top_n", top_n)
        if most is not None and most < 1:
            raise values.out_of_range("top_n", most, "at least 1")
        scores = await self.score(model, query, documents, **options)
        return sorted(enumerate(scores), key=lambda item: -item[1])[:most]

    async def classify(
        self, model: str, inputs: str | Sequence[str | Sequence[str]], **options: Unpack[SharedOptions]
    ) -> list[Classification]:
        """The probability of each class, for each text. Cancelling the task cancels the request.

        Args:
            inputs: Texts, or pairs of texts that are judged together, such as a premise and what may follow from it.

        Returns:
            A list of probabilities for each, which knows the names of the classes: see `Classification`.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> [[negative, positive]] = await client.classify("sentiment", "What a day!")
        """
        request, submit = classify_request(inputs, options)
        answer, _ = await self._connection.call("classify", request, model=model_name(model), **submit)
        rows = _counted(_result(answer.outcome, list[list[float]]), len(request.inputs))
        labels = answer.outcome.labels if answer.outcome is not None else []
        if labels and any(len(row) != len(labels) for row in rows):
            raise ProtocolError(f"{len(labels)} names came for other classes", labels=len(labels))
        return [Classification(row, labels) for row in rows]

    async def reward(
        self, model: str, inputs: str | Sequence[str | Messages], **options: Unpack[SharedOptions]
    ) -> list[list[float]]:
        """What texts or chats are worth to a reward model. Cancelling the task cancels the request.

        Args:
            inputs: Texts, or lists of messages, which go through the model's chat template.

        Returns:
            For each input one number, as the model computes it; or one for each token or step where it judges those.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> chat: list[ChatMessage] = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
            >>> [[worth]] = await client.reward("judge", [chat])
        """
        request, submit = reward_request(inputs, options)
        answer, _ = await self._connection.call("reward", request, model=model_name(model), **submit)
        return _counted(_result(answer.outcome, list[list[float]]), len(request.inputs))

    async def operate(
        self, worker: str, call: str, *, model: str = "", timeout: float | None = None, **arguments: Any
    ) -> Any:
        """An operator's call to one worker, such as loading an adapter. It is never sent twice.

        Args:
            worker, call: Whom to ask, and for what.
            model: Whose engine, where the worker has several.
            timeout: Seconds; None is two minutes.
            **arguments: The call's own: lists, maps, texts, numbers and bytes.

        Raises:
            FabricError: What ended the call; DeadlineExceededError when the time is over.

        Example:
            >>> await client.operate("gpu-1", "load_lora", name="poet", path="/adapters/poet")
        """
        request, submit = operate_request(call, arguments, timeout)
        answer, _ = await self._connection.call(
            "operate", request, model=model_name(model, empty=True), worker=model_name(worker, "worker"), **submit
        )
        return _result(answer.outcome, object)


def _counted(results: list[T], count: int) -> list[T]:
    """Results, one for each input. Raises: ProtocolError if sizes do not fit."""
    if len(results) != count:
        raise ProtocolError(f"{len(results)} results came for {count} inputs", results=len(results), inputs=count)
    return results


def _result(outcome: Outcome | None, kind: type[T]) -> T:
    if outcome is None:
        raise ProtocolError("the worker's result is missing")
    return codec.unpack_result(outcome.result, kind)
