"""What a client asks the controller about the fabric."""

from __future__ import annotations

from typing import TypedDict, TypeVar, Unpack

from msgspec import Raw

from zfabric.client import values
from zfabric.client.connection import Connection
from zfabric.client.requests import affinity_key, model_name, query_timeout_ms
from zfabric.errors import RequestError
from zfabric.wire import codec
from zfabric.wire.explanations import Explanation
from zfabric.wire.listings import ClientList, QueueList, RequestList
from zfabric.wire.status import FabricStatus, ModelStatus, ScalingStatus, WorkerStatus

T = TypeVar("T")


class ListOptions(TypedDict, total=False):
    """Which rows of a list are wanted, in which order, and how many.

    Attributes:
        model: Of this model, by its name or an alias.
        client: Of this client, by its label or number.
        worker: At this worker.
        state: In this state, such as "queued" or "running".
        sort: The order; each list has its own.
        limit: Rows at most: 100 unless something else is said, and no more than 1,000.
        offset: Rows to leave out at the beginning.
    """

    model: str
    client: str
    worker: str
    state: str
    sort: str
    limit: int
    offset: int


def list_arguments(wanted: ListOptions) -> dict[str, object]:
    """Options of a list as its question has them. Raises: RequestError, ParameterRangeError."""
    arguments: dict[str, object] = {}
    for name, value in wanted.items():
        if name not in ListOptions.__annotations__:
            raise RequestError(f"a list has no option {name!r}", parameter=name)
        if name in ("limit", "offset"):
            arguments[name] = values.whole(name, value)
        else:
            arguments[name] = model_name(value, name, empty=True)
    return arguments


class Asking:
    """Asks a controller."""

    _connection: Connection

    async def _ask(self, what: str, form: type[T], timeout: float | None, **arguments: object) -> T:
        parts = await self._parts(what, timeout, arguments)
        return codec.unpack_result(parts[-1], form)

    async def _ask_list(self, what: str, form: type[T], timeout: float | None, **arguments: object) -> list[T]:
        parts = await self._parts(what, timeout, arguments)
        return [row for part in parts for row in codec.unpack_result(part, list[form])]  # type: ignore[valid-type]

    async def _parts(self, what: str, timeout: float | None, arguments: dict[str, object]) -> list[Raw]:
        return await self._connection.ask(what, arguments, query_timeout_ms(timeout))


class AsyncQueries(Asking):
    """Questions that the controller answers from memory.

    Each takes a `timeout` in seconds; None is 10. When it is over the call raises DeadlineExceededError, or what keeps this
    client from the controller.
    """

    async def models(self, kind: str = "all", *, timeout: float | None = None) -> list[ModelStatus]:
        """Models that are served now: "all", "language", "multimodal" or "embedding" ones.

        Example:
            >>> [model.name for model in await client.models("embedding")]
            ['minilm']
        """
        return await self._ask_list("models", ModelStatus, timeout, kind=model_name(kind, "kind"))

    async def model_details(self, model: str, *, timeout: float | None = None) -> ModelStatus:
        """One model, by name or alias. Raises: UnknownModelError.

        Example:
            >>> (await client.model_details("smollm2")).context_length
            8192
        """
        return await self._ask("model", ModelStatus, timeout, name=model_name(model))

    async def workers(self, *, timeout: float | None = None) -> list[WorkerStatus]:
        """Registered workers.

        Example:
            >>> {worker.name: worker.in_flight for worker in await client.workers()}
        """
        return await self._ask_list("workers", WorkerStatus, timeout)

    async def scaling(self, *, timeout: float | None = None) -> list[ScalingStatus]:
        """How many replicas models should have that a rule is given for.

        Raises:
            RequestError: The controller is older than this question.

        Example:
            >>> {row.model: row.desired for row in await client.scaling()}
            {'smollm2': 2}
        """
        return await self._ask_list("scaling", ScalingStatus, timeout)

    async def release(self, affinity: str, *, timeout: float | None = None) -> bool:
        """Have the controller forget where requests of a key went: the session is over, or is to go elsewhere next.

        Requests that run are left alone. A call that is cancelled may have been obeyed.

        Args:
            affinity: The key that its requests were made with.

        Returns:
            Whether anything was known of the key. What was forgotten by itself, or by a new controller, was not.

        Raises:
            ParameterRangeError: The key is longer than 64 characters.
            RequestError: The controller speaks an older version of the protocol, 2.0 or 2.1, and knows no keys.

        Example:
            >>> await client.release("session-17")
            True
        """
        return await self._ask("release", bool, timeout, affinity=affinity_key(affinity))

    async def status(self, *, timeout: float | None = None) -> FabricStatus:
        """The controller in figures.

        Example:
            >>> (await client.status()).queued
            0
        """
        return await self._ask("status", FabricStatus, timeout)

    async def requests(self, *, timeout: float | None = None, **wanted: Unpack[ListOptions]) -> RequestList:
        """Attempts at the controller, and why each is where it is: an operator's of all clients, anybody else's own.

        Args:
            timeout: Seconds.
            **wanted: See `ListOptions`. Orders are "age" (the oldest first), "place" (in its queue), "deadline", "client",
                "model", "worker" and "units".

        Raises:
            RequestError, ParameterRangeError: An option that the list has not.

        Example:
            >>> for row in (await client.requests(state="queued", limit=10)).rows:
            ...     print(row.request, row.place, row.why)
        """
        return await self._ask("requests", RequestList, timeout, **list_arguments(wanted))

    async def clients(self, *, timeout: float | None = None, **wanted: Unpack[ListOptions]) -> ClientList:
        """Clients at the controller: all for an operator, itself for anybody else.

        Args:
            timeout: Seconds.
            **wanted: See `ListOptions`; `client` and `state` ("connected" or "away") choose rows. Orders are "requests" (most
                first), "age", "silence", "client" and "buffered".

        Raises:
            RequestError, ParameterRangeError: An option that the list has not.

        Example:
            >>> [row.client for row in (await client.clients()).rows if row.waiting]
        """
        return await self._ask("clients", ClientList, timeout, **list_arguments(wanted))

    async def queue(self, *, timeout: float | None = None, **wanted: Unpack[ListOptions]) -> QueueList:
        """What waits, by model and by what it demands of a worker, and why.

        Args:
            timeout: Seconds.
            **wanted: See `ListOptions`; `model` chooses rows. Orders are "waiting" (most first), "model" and "wait".

        Raises:
            RequestError, ParameterRangeError: An option that the list has not.

        Example:
            >>> [(row.model, row.waiting, row.why) for row in (await client.queue()).rows]
        """
        return await self._ask("queue", QueueList, timeout, **list_arguments(wanted))

    async def explain(self, request: str, *, limit: int = 100, timeout: float | None = None) -> Explanation:
        """Why a request went where it went, or why it waits: an operator's question is for all, anybody else's for its own.

        Args:
            request: Its name, as `requests` lists it.
            limit: Hosts at most, up to 1,000.
            timeout: Seconds.

        Raises:
            RequestError, ParameterRangeError: No such request is at the controller, nor among its last dispatches; or a limit
                that there is none of.

        Example:
            >>> for choice in (await client.explain("5f2c9d0e1b7a4c33")).choices:
            ...     print(choice.worker, choice.policy, choice.loads)
        """
        return await self._ask("explain", Explanation, timeout, request=request, limit=limit)

    async def refresh(self, *, timeout: float | None = None) -> list[str]:
        """Have every worker report its load now. Returns the names of those that are asked.

        Example:
            >>> await client.refresh()
            ['gpu-1', 'gpu-2']
        """
        return await self._ask_list("refresh", str, timeout)
