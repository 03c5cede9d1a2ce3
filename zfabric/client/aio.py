"""The asyncio client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

from zfabric.client import values
from zfabric.client.connection import Connection
from zfabric.client.many import CompletionBatch, Feed, Prompt
from zfabric.client.options import AnswerOptions, EmbedOptions, GenerateOptions, Messages, SharedOptions
from zfabric.client.queries import AsyncQueries
from zfabric.client.requests import (
    classify_request,
    count_request,
    detokenize_request,
    embed_request,
    generate_request,
    model_name,
    operate_request,
    score_request,
    vectors,
)
from zfabric.client.results import Completion
from zfabric.client.stream import TokenStream
from zfabric.errors import ConfigurationError, ProtocolError, RequestError
from zfabric.limits import DEADLINE_MAX_MS
from zfabric.transport.curve import Credentials, default_credentials
from zfabric.transport.endpoints import check_endpoint, default_endpoint
from zfabric.transport.links import choose
from zfabric.wire import codec
from zfabric.wire.payloads import EmbedResult, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class AsyncClient(AsyncQueries):
    """A client of the fabric, for one event loop. Use as an async context manager.

    Every error of its calls is a FabricError: one of a wrong argument names it, and is raised before anything is sent.
    Only a call that lacks an argument is Python's own TypeError.

    Args:
        endpoint: The controller's; the default is the one all sides derive on one host.
        connect_timeout_ms: How long requests wait for a controller that is not there, at the start or after it was
            lost, before they fail with ConnectionLostError, or with what the controller said if it refused for a reason
            that may pass. Within that time an outage is invisible.
        label: Shown to operators.
        credentials: Keys for a controller that wants them; $ZFABRIC_KEY and $ZFABRIC_CONTROLLER_KEY by default.
        transport: The driver of the socket, "loop" or "libzmq"; $ZFABRIC_TRANSPORT by default, else loop.

    Raises:
        ConfigurationError: One of them cannot work.

    Example:
        >>> async with AsyncClient() as client:
        ...     completion = await client.generate("smollm2", "Once upon a time", max_new_tokens=32)
        ...     print(completion.text)
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout_ms: int = 10_000,
        label: str = "",
        credentials: Credentials | None = None,
        transport: str | None = None,
    ) -> None:
        try:
            timeout_ms = values.whole("connect_timeout_ms", connect_timeout_ms)
            if not 0 <= timeout_ms <= DEADLINE_MAX_MS:
                raise values.out_of_range("connect_timeout_ms", timeout_ms, f"0 … {DEADLINE_MAX_MS}")
            taken_label = model_name(label, "label", empty=True)
            self.endpoint = check_endpoint(values.text("endpoint", endpoint or default_endpoint()))
        except RequestError as error:
            raise ConfigurationError(error.message, **error.details) from None
        if credentials is not None and not isinstance(credentials, Credentials):
            raise ConfigurationError(
                f"credentials is a {type(credentials).__name__}, it must be Credentials", parameter="credentials"
            )
        self._connection = Connection(
            self.endpoint,
            connect_timeout_ms=timeout_ms,
            label=taken_label,
            credentials=credentials or default_credentials(),
            transport=choose(transport),
        )

    async def __aenter__(self) -> AsyncClient:
        self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def open(self) -> None:
        """Start connecting, on the running loop. Requests may be made at once.

        Raises:
            ClosedError: Open already, closed, of another process, or there is no running loop.
            ConnectionLostError: No socket can be made.
        """
        self._connection.open()

    async def close(self) -> None:
        """End all requests with ClosedError, say goodbye, and free the socket. Safe to call twice."""
        await self._connection.close()

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def stream(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> TokenStream:
        """Ask for text; the request leaves at once, and its answer is read from the stream.

        Args:
            model: Name or alias.
            prompt: Text; or give `messages` or `prompt_token_ids`.
            **options: See `GenerateOptions`.

        Raises:
            FabricError: The request can never be sent. All other errors come from the stream.

        Example:
            >>> async for delta in client.stream("smollm2", "Once upon a time", timeout=30):
            ...     print(delta.text, end="")
        """
        request, submit = generate_request(prompt, options)
        name = model_name(model)
        stream = TokenStream(self._connection, name, request.sampling.n)
        stream._bind(lambda sink: self._connection.submit("generate", request, sink, model=name, **submit))
        return stream

    async def generate(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Ask for text and wait for all of it; arguments as of `stream`. Cancelling the task cancels the request.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> completion = await client.generate("smollm2", "Once upon a time", max_new_tokens=32, seed=7)
            >>> completion.text, completion.usage.total_tokens
        """
        request, submit = generate_request(prompt, options)
        name = model_name(model)
        answer, pending = await self._connection.call("generate", request, request.sampling.n, model=name, **submit)
        return answer.completion(f"{pending.number:x}", name)

    async def chat(self, model: str, messages: Messages, **options: Unpack[AnswerOptions]) -> Completion:
        """The next message of a chat: as `generate` with `messages`.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> messages: list[ChatMessage] = [{"role": "user", "content": "Hello!"}]
            >>> completion = await client.chat("smollm2", messages, max_tokens=64)
            >>> messages.append({"role": "assistant", "content": completion.text})
        """
        return await self.generate(model, **chat_options(messages, options))

    def generate_many(
        self,
        model: str,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 16,
        **options: Unpack[AnswerOptions],
    ) -> CompletionBatch:
        """Ask for many texts, a bounded number at a time; results come in order of completion.

        Closing the iterator or dropping it cancels what runs. Cancelling one `anext` ends that wait alone.

        Args:
            model: Name or alias.
            prompts: Each a text, a list of token ids, or a list of messages. Taken one by one as places become free.
            concurrency: How many run, or wait to be read, at most.
            **options: As of `stream`, for all of them.

        Returns:
            An async iterator of (position in `prompts`, Completion or the FabricError that this one ended with).

        Raises:
            FabricError: An option is wrong for all of them.

        Example:
            >>> async for position, result in client.generate_many("smollm2", questions, concurrency=8):
            ...     print(position, result.text if isinstance(result, Completion) else result)
        """
        return CompletionBatch(self._connection, Feed(model, prompts, concurrency, options))

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

    async def count_tokens(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
    ) -> int:
        """Tokens of a prompt, as `stream` would use them. Cancelling the task cancels the request.

        Args:
            timeout: Seconds; None is two minutes.

        Raises:
            FabricError: What ended the request; DeadlineExceededError when the time is over.

        Example:
            >>> await client.count_tokens("smollm2", "Once upon a time")
            4
        """
        request, submit = count_request(prompt, messages, timeout)
        answer, _ = await self._connection.call("count_tokens", request, model=model_name(model), **submit)
        return _result(answer.outcome, int)

    async def tokenize(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """The tokens of a prompt, as `stream` would use them. Arguments and errors as of `count_tokens`.

        Example:
            >>> await client.tokenize("smollm2", "Once upon a time")
            [6403, 3698, 253, 655]
        """
        request, submit = count_request(prompt, messages, timeout)
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
        self, model: str, inputs: str | Sequence[str], **options: Unpack[SharedOptions]
    ) -> list[list[float]]:
        """The probability of each class, for each text. Cancelling the task cancels the request.

        Raises:
            FabricError: What ended the request.

        Example:
            >>> [[negative, positive]] = await client.classify("sentiment", "What a day!")
        """
        request, submit = classify_request(inputs, options)
        answer, _ = await self._connection.call("classify", request, model=model_name(model), **submit)
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

    def figures(self) -> dict[str, int]:
        """What this client counted: failovers, repeated chunks, reconnects …."""
        return self._connection.figures()


def chat_options(messages: Messages, options: AnswerOptions) -> GenerateOptions:
    """The options of a chat's next message. Raises: RequestError if something else is to be answered as well."""
    for name in ("messages", "prompt", "prompt_token_ids"):
        if name in options:
            raise RequestError(f"{name} has no place in a chat besides its messages", parameter=name)
    if messages is None:
        raise values.wrong("messages", messages, "a list of maps")
    return cast(GenerateOptions, {**options, "messages": messages})


def _counted(results: list[T], count: int) -> list[T]:
    """Results, one for each input. Raises: ProtocolError if sizes do not fit."""
    if len(results) != count:
        raise ProtocolError(f"{len(results)} results came for {count} inputs", results=len(results), inputs=count)
    return results


def _result(outcome: Outcome | None, kind: type[T]) -> T:
    if outcome is None:
        raise ProtocolError("the worker's result is missing")
    return codec.unpack_result(outcome.result, kind)
