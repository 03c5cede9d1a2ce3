"""What an operator has the controller change at run time. With keys, each call needs an operator's key."""

from __future__ import annotations

from zfabric.client import values
from zfabric.client.queries import Asking
from zfabric.client.requests import model_name
from zfabric.limits import DEADLINE_MAX_MS, KICK_MS, UNTAKEN_MS
from zfabric.wire.steering import Setting, Stopped


class AsyncSteering(Asking):
    """Calls of an operator. They last until they are taken back or the controller ends, whoever comes and goes meanwhile, and
    the controller's log says who made them.

    Each takes a `timeout` in seconds as the questions do, and raises PermissionDeniedError where the key is no operator's.
    To cancel a call takes nothing back.
    """

    async def drain_worker(
        self, worker: str, limit_ms: int = 0, *, stay: bool = False, timeout: float | None = None
    ) -> str:
        """Have a worker take nothing new, finish what it has, and leave; or stay, for `undrain_worker`. Returns its name.

        Args:
            worker: Its name.
            limit_ms: Milliseconds that running requests may take before they are handed to others; 0 is the worker's own limit.
            stay: The process stays, and takes nothing new until it is undrained, also when it comes back under its name.
            timeout: Seconds.

        Raises:
            NoWorkerError: Nobody has the name.

        Example:
            >>> await client.drain_worker("gpu-1", limit_ms=60_000)
            'gpu-1'
        """
        limit = values.whole("limit_ms", limit_ms)
        if not 0 <= limit < 2**32:
            raise values.out_of_range("limit_ms", limit, f"0 … {2**32 - 1}")
        return await self._ask(
            "drain", str, timeout, worker=model_name(worker, "worker"), limit_ms=limit, stay=bool(stay)
        )

    async def undrain_worker(self, worker: str, *, timeout: float | None = None) -> str:
        """Have a worker take requests again that an operator has drained. Returns its name.

        A worker that is told to leave stays if it has not left yet, and nobody at its host wants it to leave.

        Raises:
            NoWorkerError: Nobody has the name.
            UnsupportedOperationError: It leaves, and its version cannot be told to stay.

        Example:
            >>> await client.undrain_worker("gpu-1")
            'gpu-1'
        """
        return await self._ask("undrain", str, timeout, worker=model_name(worker, "worker"))

    async def pause_model(self, model: str, *, wait_ms: int = UNTAKEN_MS, timeout: float | None = None) -> str:
        """Have a model's requests wait; what runs runs on. Returns the model's own name.

        Args:
            model: Name or alias.
            wait_ms: Milliseconds from now for which requests wait; then they are refused with NoWorkerError, as new ones
                are. 0 refuses at once. Deadlines go on all the while.
            timeout: Seconds.

        Raises:
            UnknownModelError: Nobody serves it.

        Example:
            >>> await client.pause_model("smollm2", wait_ms=300_000)
            'smollm2'
        """
        wait = values.whole("wait_ms", wait_ms)
        if not 0 <= wait <= DEADLINE_MAX_MS:
            raise values.out_of_range("wait_ms", wait, f"0 … {DEADLINE_MAX_MS}")
        return await self._ask("pause", str, timeout, model=model_name(model), wait_ms=wait)

    async def resume_model(self, model: str, *, timeout: float | None = None) -> str:
        """Have a paused model's requests dispatched again. Returns the model's own name. Raises: UnknownModelError.

        Example:
            >>> await client.resume_model("smollm2")
            'smollm2'
        """
        return await self._ask("resume", str, timeout, model=model_name(model))

    async def cancel_request(self, request: str, *, client: str = "", timeout: float | None = None) -> Stopped:
        """End anybody's request: its client gets StoppedByOperatorError, which names the operator.

        Args:
            request: Its name, as `requests` and `stream.request_id` have it.
            client: Label or number of its client, where several have one of this name.
            timeout: Seconds.

        Raises:
            RequestError: Nobody waits for it.

        Example:
            >>> (await client.cancel_request("2f1c66ab01d4e3f0")).client
            'backend-1'
        """
        return await self._ask(
            "cancel",
            Stopped,
            timeout,
            request=model_name(request, "request"),
            client=model_name(client, "client", empty=True),
        )

    async def kick_client(self, client: str, *, refuse_ms: int = KICK_MS, timeout: float | None = None) -> Stopped:
        """End a client's requests and its session, and let it have none for some time.

        Args:
            client: Its label or number.
            refuse_ms: Milliseconds in which it is refused with PermissionDeniedError; 0 lets it come back at once.
            timeout: Seconds.

        Raises:
            RequestError: No client has this label or number, or several have it.

        Example:
            >>> (await client.kick_client("backend-1")).requests
        """
        refuse = values.whole("refuse_ms", refuse_ms)
        if not 0 <= refuse <= DEADLINE_MAX_MS:
            raise values.out_of_range("refuse_ms", refuse, f"0 … {DEADLINE_MAX_MS}")
        return await self._ask("kick", Stopped, timeout, client=model_name(client, "client"), refuse_ms=refuse)

    async def settings(self, *, timeout: float | None = None) -> list[Setting]:
        """All settings of the controller, and the speeds of its workers.

        Example:
            >>> {row.name: row.value for row in await client.settings() if row.changeable}
        """
        return await self._ask_list("config", Setting, timeout)

    async def change_setting(
        self, name: str, value: int | float | str | None, *, timeout: float | None = None
    ) -> Setting:
        """Change a setting of the running controller; None is what it was at the start. Returns how it is now.

        Args:
            name: As `settings` has it; "speed." and a worker's name for its speed.
            value: The new value.
            timeout: Seconds.

        Raises:
            ConfigurationError: There is no such setting, it cannot be changed, or not to this value.
            NoWorkerError: The speed is of nobody.

        Example:
            >>> (await client.change_setting("speed.gpu-1", 2.0)).value
            2.0
        """
        return await self._ask("set_config", Setting, timeout, name=model_name(name, "name"), value=value)
