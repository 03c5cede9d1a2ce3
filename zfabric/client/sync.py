"""The blocking client: the asyncio one on a thread of its own, behind calls that wait.

One implementation serves both, and beats, credit and failover go on while the caller computes. A token crosses threads
by a lock and a wake-up, not by a future.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from zfabric.client.aio import AsyncClient, chat_options
from zfabric.client.blocking import BlockingStream
from zfabric.client.loop_thread import LoopThread
from zfabric.client.many import BlockingBatch, Feed, Prompt
from zfabric.client.options import (
    AnswerOptions,
    EmbedOptions,
    EmbedTokensOptions,
    GenerateOptions,
    Messages,
    SharedOptions,
    TemplateOptions,
)
from zfabric.client.requests import generate_request, model_name
from zfabric.client.results import Classification, Completion
from zfabric.client.sync_queries import BlockingQueries
from zfabric.limits import DEATHS_DEFAULT
from zfabric.transport.curve import Credentials

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from opentelemetry.trace import TracerProvider


class Client(BlockingQueries):
    """A blocking client, safe to share between threads. Use as a context manager.

    It belongs to the process that made it: after a fork its calls raise ClosedError, and the child makes its own. An
    interrupt (Ctrl-C) while a call waits ends the call's request.

    Args:
        endpoint, connect_timeout_ms, label, credentials, transport, tracing, worker_deaths_max: As of `AsyncClient`.
        spin_us: As well; its own thread then holds the interpreter more often than it would.

    Raises:
        ConfigurationError: One of them cannot work.

    Example:
        >>> with Client() as client:
        ...     print(client.generate("smollm2", "Once upon a time", max_new_tokens=32).text)
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout_ms: int = 10_000,
        label: str = "",
        credentials: Credentials | None = None,
        transport: str | None = None,
        spin_us: int | None = None,
        tracing: bool | TracerProvider = False,
        worker_deaths_max: int = DEATHS_DEFAULT,
    ) -> None:
        self._client = AsyncClient(
            endpoint,
            connect_timeout_ms=connect_timeout_ms,
            label=label,
            credentials=credentials,
            transport=transport,
            spin_us=spin_us,
            tracing=tracing,
            worker_deaths_max=worker_deaths_max,
        )
        self._thread = LoopThread(self._client.open, self._client.close)

    @property
    def endpoint(self) -> str:
        """The controller's."""
        return self._client.endpoint

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all requests with ClosedError and stop the thread. Safe to call twice, and after a fork."""
        self._thread.stop()

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def stream(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> BlockingStream:
        """As `AsyncClient.stream`.

        Example:
            >>> for delta in client.stream("smollm2", "Once upon a time", timeout=30):
            ...     print(delta.text, end="")
        """
        request, submit = generate_request(prompt, options)
        name = model_name(model)
        connection = self._client._connection
        stream = BlockingStream(connection, name, request.sampling.n)
        # On the loop, so that a stream whose call is interrupted here is dropped, and cancelled, all the same.
        self._thread.call(
            lambda: stream._bind(lambda sink: connection.submit("generate", request, sink, model=name, **submit))
        )
        return stream

    def generate(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """As `AsyncClient.generate`.

        Example:
            >>> client.generate("smollm2", "Once upon a time", max_new_tokens=32, seed=7).text
        """
        return self._thread.wait(self._client.generate(model, prompt, **options))

    def chat(self, model: str, messages: Messages, **options: Unpack[AnswerOptions]) -> Completion:
        """As `AsyncClient.chat`.

        Example:
            >>> client.chat("smollm2", [{"role": "user", "content": "Hello!"}], max_tokens=64).text
        """
        return self.generate(model, **chat_options(messages, options))

    def generate_many(
        self, model: str, prompts: Iterable[Prompt], *, concurrency: int = 16, **options: Unpack[AnswerOptions]
    ) -> BlockingBatch:
        """As `AsyncClient.generate_many`; an iterator, which takes the prompts in the thread that reads it.

        Example:
            >>> for position, result in client.generate_many("smollm2", questions, concurrency=8):
            ...     print(position, result.text if isinstance(result, Completion) else result)
        """

        def run(begin: Callable[[], None]) -> None:
            self._thread.call(begin)

        self._thread.start()
        return BlockingBatch(self._client._connection, Feed(model, prompts, concurrency, options), run)

    def embed(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[EmbedOptions],
    ) -> NDArray[np.float32]:
        """As `AsyncClient.embed`.

        Example:
            >>> client.embed("minilm", ["one text", "another"]).shape
            (2, 384)
        """
        return self._thread.wait(self._client.embed(model, inputs, **options))

    def embed_tokens(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[EmbedTokensOptions],
    ) -> list[NDArray[np.float32]]:
        """As `AsyncClient.embed_tokens`.

        Example:
            >>> [vectors] = client.embed_tokens("colbert", "one text")
        """
        return self._thread.wait(self._client.embed_tokens(model, inputs, **options))

    def count_tokens(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **template: Unpack[TemplateOptions],
    ) -> int:
        """As `AsyncClient.count_tokens`.

        Example:
            >>> client.count_tokens("smollm2", "Once upon a time")
            4
        """
        return self._thread.wait(
            self._client.count_tokens(model, prompt, messages=messages, timeout=timeout, **template)
        )

    def tokenize(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **template: Unpack[TemplateOptions],
    ) -> list[int]:
        """As `AsyncClient.tokenize`.

        Example:
            >>> client.tokenize("smollm2", "Once upon a time")
            [6403, 3698, 253, 655]
        """
        return self._thread.wait(self._client.tokenize(model, prompt, messages=messages, timeout=timeout, **template))

    def detokenize(
        self, model: str, token_ids: Sequence[int], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """As `AsyncClient.detokenize`.

        Example:
            >>> client.detokenize("smollm2", [6403, 3698])
            'Once upon'
        """
        return self._thread.wait(
            self._client.detokenize(model, token_ids, skip_special_tokens=skip_special_tokens, timeout=timeout)
        )

    def score(
        self, model: str, query: str, documents: str | Sequence[str], **options: Unpack[SharedOptions]
    ) -> list[float]:
        """As `AsyncClient.score`.

        Example:
            >>> scores = client.score("reranker", "What is a cat?", ["A pet.", "A stone."])
        """
        return self._thread.wait(self._client.score(model, query, documents, **options))

    def rerank(
        self,
        model: str,
        query: str,
        documents: str | Sequence[str],
        *,
        top_n: int | None = None,
        **options: Unpack[SharedOptions],
    ) -> list[tuple[int, float]]:
        """As `AsyncClient.rerank`.

        Example:
            >>> [(best, score), *rest] = client.rerank("reranker", "What is a cat?", ["A pet.", "A stone."])
        """
        return self._thread.wait(self._client.rerank(model, query, documents, top_n=top_n, **options))

    def classify(
        self, model: str, inputs: str | Sequence[str | Sequence[str]], **options: Unpack[SharedOptions]
    ) -> list[Classification]:
        """As `AsyncClient.classify`.

        Example:
            >>> [[negative, positive]] = client.classify("sentiment", "What a day!")
        """
        return self._thread.wait(self._client.classify(model, inputs, **options))

    def reward(
        self, model: str, inputs: str | Sequence[str | Messages], **options: Unpack[SharedOptions]
    ) -> list[list[float]]:
        """As `AsyncClient.reward`.

        Example:
            >>> [[worth]] = client.reward("judge", "The answer is 4.")
        """
        return self._thread.wait(self._client.reward(model, inputs, **options))

    def operate(
        self, worker: str, call: str, *, model: str = "", timeout: float | None = None, **arguments: Any
    ) -> Any:
        """As `AsyncClient.operate`.

        Example:
            >>> client.operate("gpu-1", "load_lora", name="poet", path="/adapters/poet")
        """
        return self._thread.wait(self._client.operate(worker, call, model=model, timeout=timeout, **arguments))

    def figures(self) -> dict[str, int]:
        """As `AsyncClient.figures`."""
        return self._thread.call(self._client.figures)
