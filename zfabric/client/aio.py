"""The asyncio client."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Unpack, cast

from zfabric.client import values
from zfabric.client.connection import Connection
from zfabric.client.many import CompletionBatch, Feed, Prompt
from zfabric.client.options import AnswerOptions, GenerateOptions, Messages
from zfabric.client.queries import AsyncQueries
from zfabric.client.reader import AnswerReader
from zfabric.client.requests import (
    generate_request,
    model_name,
)
from zfabric.client.results import Completion
from zfabric.client.steering import AsyncSteering
from zfabric.client.stream import TokenStream
from zfabric.client.tasks import AsyncTasks
from zfabric.client.traces import tracer_of
from zfabric.errors import ConfigurationError, RequestError
from zfabric.limits import ATTEMPTS_WITHOUT_PROGRESS_MAX, DEADLINE_MAX_MS, DEATHS_DEFAULT
from zfabric.transport.curve import Credentials, default_credentials
from zfabric.transport.endpoints import check_endpoints, default_endpoint
from zfabric.transport.links import choose, choose_spin

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider


class AsyncClient(AsyncTasks, AsyncQueries, AsyncSteering):
    """A client of the fabric, for one event loop. Use as an async context manager.

    Every error of its calls is a FabricError: one of a wrong argument names it, and is raised before anything is sent.
    Only a call that lacks an argument is Python's own TypeError.

    Args:
        endpoint: The controller's; the default is the one all sides derive on one host. Of several, with commas between them,
            or of a name that has several addresses, the client has one at a time, and goes to another when that is lost.
        connect_timeout_ms: How long requests wait for a controller that is not there, at the start or after it was
            lost, before they fail with ConnectionLostError, or with what the controller said if it refused for a reason
            that may pass. Within that time an outage is invisible.
        label: Shown to operators.
        credentials: Keys for a controller that wants them; $ZFABRIC_KEY and $ZFABRIC_CONTROLLER_KEY by default.
        transport: The driver of the socket, "loop" or "libzmq"; $ZFABRIC_TRANSPORT by default, else loop.
        spin_us: Busy polling: look for answers for so many microseconds after each message before the loop sleeps, for a
            program that has a core to itself; $ZFABRIC_SPIN_US by default, else not at all.
        worker_deaths_max: Workers that may die or hang under a request in a row, 1 … 3, without a unit of its answer in
            between; then it ends with PoisonousRequestError and is sent to no other.
        tracing: Make an OpenTelemetry span of each request, below the caller's current one, with the program's own tracer
            provider (True) or another. It needs `zfabric[tracing]`.

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
        spin_us: int | None = None,
        tracing: bool | TracerProvider = False,
        worker_deaths_max: int = DEATHS_DEFAULT,
    ) -> None:
        try:
            timeout_ms = values.whole("connect_timeout_ms", connect_timeout_ms)
            if not 0 <= timeout_ms <= DEADLINE_MAX_MS:
                raise values.out_of_range("connect_timeout_ms", timeout_ms, f"0 … {DEADLINE_MAX_MS}")
            deaths_max = values.whole("worker_deaths_max", worker_deaths_max)
            if not 1 <= deaths_max <= ATTEMPTS_WITHOUT_PROGRESS_MAX:
                raise values.out_of_range("worker_deaths_max", deaths_max, f"1 … {ATTEMPTS_WITHOUT_PROGRESS_MAX}")
            taken_label = model_name(label, "label", empty=True)
            self.endpoint = check_endpoints(values.text("endpoint", endpoint or default_endpoint()))
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
            spin_us=choose_spin(spin_us, transport),
            tracer=tracer_of(tracing),
            deaths_max=deaths_max,
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

    def reader(self) -> AnswerReader:
        """One reader for many streams: it takes all that has arrived in one call, with one task switch for all of them.

        Raises:
            ClosedError: The client is not open, or belongs to another loop or process.

        Example:
            >>> async with client.reader() as reader:
            ...     for question in questions:
            ...         reader.stream("smollm2", question, max_new_tokens=64)
            ...     async for batch in reader:
            ...         for stream, delta in batch:
            ...             print(stream.request_id, delta.text if delta is not None else stream.finish_reason)
        """
        return AnswerReader(self._connection)

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
