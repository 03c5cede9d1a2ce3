"""A client's session driven over its socket, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Final, Protocol

from msgspec import Raw

from zfabric.client import process
from zfabric.client.mailbox import Collector
from zfabric.client.traces import Tracer, above, submit_traced
from zfabric.core.client.pending import Pending, Sink
from zfabric.core.client.session import ClientSession
from zfabric.errors import ClosedError, ConnectionLostError, FabricError
from zfabric.ids import milliseconds
from zfabric.limits import BAD_FRAMES_MAX, DEATHS_DEFAULT
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.curve import Credentials
from zfabric.transport.links import DealerDriver, open_dealer
from zfabric.transport.loop_timer import LoopTimer
from zfabric.version import __version__
from zfabric.wire.fields import Operation
from zfabric.wire.payloads import AnyRequest

_log: Final = logging.getLogger("zfabric.client")
_SECRET_BYTES: Final = 16


class Waiting(Protocol):
    """Somebody who may wait for what no request of theirs will end."""

    def wake(self) -> None: ...


class Connection:
    """What is under a client: its session, its socket, and the time that it waits for a controller.

    Args:
        endpoint: The controller's, checked.
        connect_timeout_ms, label, credentials, transport, spin_us: As of `AsyncClient`.
        tracer: Makes a span of each request; None for no spans.

    Attributes:
        session: The protocol's state.
        closing: Whom to wake when the client is closed; not kept alive by this.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        connect_timeout_ms: int,
        label: str,
        credentials: Credentials | None,
        transport: str | None = None,
        spin_us: int | None = None,
        tracer: Tracer | None = None,
        deaths_max: int = DEATHS_DEFAULT,
    ) -> None:
        self.endpoint = endpoint
        self._tracer = tracer
        self._transport = transport
        self._spin_us = spin_us
        self._credentials = credentials
        self._connect_timeout_ms = connect_timeout_ms
        # A worker sees numbers and seeds of what it runs. From some hundred of Python's usual ones the next could be computed,
        # and with them written to what other workers run.
        self._rng = secrets.SystemRandom()
        self.session = ClientSession(
            instance=secrets.randbits(63),
            rng=self._rng,
            build=__version__,
            label=label,
            secret=secrets.token_bytes(_SECRET_BYTES),
            on_fault=self._note,
            deaths_max=deaths_max,
        )
        self.closing: weakref.WeakSet[Waiting] = weakref.WeakSet()
        self._home = process.here
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: DealerDriver | None = None
        self._away: asyncio.TimerHandle | None = None
        self._flush_due = False
        self._closed = False
        self._bad_messages = 0
        self._noted = 0

    def open(self) -> None:
        """Start connecting, on the running loop.

        Raises:
            ClosedError: Open already, closed, of another process, or there is no running loop.
            ConfigurationError, ConnectionLostError: No socket can be made.
        """
        process.check(self._home)
        if self._closed:
            raise ClosedError("the client was closed; make a new one")
        if self._link is not None:
            raise ClosedError("the client is open already")
        self._loop = _running_loop()
        self._timer = LoopTimer(self._loop, self._tick)
        self.session.leave = self._leave
        try:
            self._link = open_dealer(self.endpoint, self, self._rng, self._credentials, self._transport, self._spin_us)
        except FabricError:
            raise
        except Exception as error:
            raise ConnectionLostError(
                f"no socket can be made for {self.endpoint}: {error}", endpoint=self.endpoint
            ) from error
        self.session.several = self._link.several

    async def close(self) -> None:
        """End all requests with ClosedError, say goodbye, and free the socket. Safe to call twice, and after a fork."""
        if self._home is not process.here:
            return
        self._closed = True
        link, self._link = self._link, None
        if link is None:
            return
        self.session.close()
        link.send_all(self._taken())
        for waiting in list(self.closing):
            waiting.wake()
        # One turn, so that tasks that wait for streams see their end before the client is gone.
        await asyncio.sleep(0)
        self._timer.cancel()
        self._cancel_away()
        link.close()

    def figures(self) -> dict[str, int]:
        """What was counted."""
        link = self._link.counted() if self._link is not None else {}
        return {**asdict(self.session.counters), **link, "bad_messages": self._bad_messages}

    # ── what is asked ─────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, operation: Operation, request: AnyRequest, sink: Sink, **options: Any) -> Pending:
        """Accept a request. It leaves now, or when the controller is there. Raises: FabricError if it never can."""
        link = self.check_open()
        now_ns = monotonic_ns()
        context = above()
        if self._tracer is not None or context is not None:
            pending = submit_traced(self.session, self._tracer, context, operation, request, sink, now_ns, **options)
        else:
            pending = self.session.submit(operation, request, sink, now_ns, **options)
        self.session.accepted(now_ns)
        if not self.session.ready:
            self._wait_for_controller()
        elif not self._flush_due:
            # The first request of a turn leaves at once; those that follow it in the same turn leave together.
            self._schedule_flush()
            link.send_all(self._taken())
        self._timer.arm(self.session.timers.next_ns(), now_ns)
        return pending

    async def call(
        self, operation: Operation, request: AnyRequest, choices: int = 1, **options: Any
    ) -> tuple[Collector, Pending]:
        """Submit and wait for the end. Raises the request's error; cancelling the task cancels the request."""
        self.check_open()
        done = self.new_future()
        pending: Pending | None = None

        def end() -> None:
            if not done.done():
                done.set_result(None)

        def consumed(units: int) -> None:
            if pending is not None:
                self.consumed(pending, units)

        collector = Collector(choices, end, consumed)
        pending = self.submit(operation, request, collector, **options)
        try:
            await done
        except asyncio.CancelledError:
            self.cancel(pending)
            raise
        if collector.error is not None:
            raise collector.error
        return collector, pending

    async def ask(self, what: str, arguments: dict[str, object], timeout_ms: int) -> list[Raw]:
        """Ask the controller. Returns the parts of the answer. Raises: FabricError, also when the time is over."""
        self.check_open()
        now_ns = monotonic_ns()
        inquirer = _Inquirer(asyncio.get_running_loop().create_future())
        inquiry = self.session.ask(what, arguments, inquirer, now_ns, timeout_ms)
        self.session.accepted(now_ns)
        if self.session.ready:
            self._schedule_flush()
        else:
            self._wait_for_controller()
        self._timer.arm(self.session.timers.next_ns(), now_ns)
        try:
            return await inquirer.future
        finally:
            self.session.inquiries.forget(inquiry)

    def consumed(self, pending: Pending, units: int) -> None:
        """A reader took units."""
        self.consumed_all(((pending, units),))

    def consumed_all(self, read: Iterable[tuple[Pending, int]]) -> None:
        """A reader took units of each of these."""
        self.session.consumed(read)
        if self.session.flush_due:
            self._schedule_flush()

    def cancel(self, pending: Pending) -> None:
        """A reader gave up."""
        process.check(self._home)
        self.session.cancel(pending)
        self._schedule_flush()

    def dropped(self, pending: Pending) -> None:
        """A reader was collected, in whatever thread and in the middle of whatever runs there."""
        self.soon(lambda: self.cancel(pending))

    def soon(self, call: Callable[[], None]) -> None:
        """Have something done on this client's loop, from any thread. Nothing is done if the loop is closed."""
        loop = self._loop
        if loop is not None and self._home is process.here:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call)

    def new_future(self) -> asyncio.Future[None]:
        """A future on this client's loop. Raises: ClosedError on another one."""
        return self.check_loop().create_future()

    def check_open(self) -> DealerDriver:
        """The socket. Raises: ClosedError if there is none, or in another process or on another loop than its own."""
        if self._link is None:
            process.check(self._home)
            why = "was closed" if self._closed else "is not open; use it in an async with block"
            raise ClosedError(f"the client {why}")
        self.check_loop()
        return self._link

    def check_loop(self) -> asyncio.AbstractEventLoop:
        """This client's loop. Raises: ClosedError if another one runs here, or none."""
        process.check(self._home)
        loop = _running_loop()
        if loop is not self._loop:
            raise ClosedError("the client belongs to another event loop than the one that runs here")
        return loop

    # ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _schedule_flush(self) -> None:
        if not self._flush_due and self._loop is not None and not self._loop.is_closed():
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self.link_idle()

    def _taken(self) -> list[tuple[bytes, bytes]]:
        taken, self.session.outbox = self.session.outbox, []
        return taken

    def _tick(self) -> None:
        self._guarded(lambda: self.session.tick(monotonic_ns()))
        self.link_idle()

    # ── link ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self) -> None:
        if self._link is not None:
            self.session.several = self._link.several
        self.session.connected(monotonic_ns())

    def _leave(self) -> None:
        """The controller says nothing, or wants nobody: there are others."""
        if self._link is not None:
            self._link.move_on()

    def link_down(self) -> None:
        self.session.disconnected()

    def link_denied(self, error: FabricError) -> None:
        self.session.denied(error)
        self.link_idle()

    def link_message(self, header: bytes, body: bytes) -> None:
        try:
            self.session.receive(header, body, monotonic_ns())
        except Exception as error:  # noqa: BLE001 — nothing that a peer sends may stop what reads for all streams
            self._bad_messages += 1
            self._note(error)

    def link_idle(self) -> None:
        """Send what there is to say, and see to it that nobody waits for a controller without end."""
        link, session = self._link, self.session
        if link is None:
            return
        if session.flush_due:
            self._guarded(session.flush)
        if session.outbox:
            link.send_all(self._taken())
        if session.ready:
            if self._away is not None:
                self._cancel_away()
        elif session.refused is not None and not session.refused.retryable:
            session.abandon(session.refused)
        elif session.busy:
            self._wait_for_controller()
        self._timer.arm(session.timers.next_ns(), monotonic_ns())

    def _guarded(self, call: Callable[[], None]) -> None:
        """What a peer sent may have led to this as well, so it must not stop the loop that reads."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 — as in `link_message`
            self._bad_messages += 1
            self._note(error)

    def _note(self, error: Exception) -> None:
        """Log what no caller hears of; a peer that sends nothing else does not fill a disk."""
        self._noted += 1
        if self._noted <= BAD_FRAMES_MAX:
            own = not isinstance(error, FabricError)
            _log.warning(
                "a message between client and controller was no use: %r", error, exc_info=error if own else None
            )

    # ── without a controller ──────────────────────────────────────────────────────────────────────────────────────────

    def _wait_for_controller(self) -> None:
        """Have requests end that wait for longer than the connect timeout, at the start or from a loss on."""
        if self.session.refused is not None and not self.session.refused.retryable:
            self._schedule_flush()
        elif self._away is None and self._loop is not None:
            self._away = self._loop.call_later(self._connect_timeout_ms / 1_000, self._give_up)

    def _cancel_away(self) -> None:
        if self._away is not None:
            self._away.cancel()
            self._away = None

    def _give_up(self) -> None:
        """End what has waited for long enough; what was asked for later has its own time."""
        self._away = None
        trouble = f": {self._link.trouble}" if self._link is not None and self._link.trouble else ""
        error = self.session.refused or ConnectionLostError(
            f"no controller answers at {self.endpoint} for {self._connect_timeout_ms} ms{trouble}",
            endpoint=self.endpoint,
        )
        now_ns = monotonic_ns()
        self.session.abandon(error, now_ns - milliseconds(self._connect_timeout_ms))
        oldest_ns = self.session.oldest_ns
        if oldest_ns is not None and self._loop is not None:
            left_ns = oldest_ns + milliseconds(self._connect_timeout_ms) - now_ns
            self._away = self._loop.call_later(max(0, left_ns) / 1e9, self._give_up)


class _Inquirer:
    """Who waits for one answer of the controller."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[list[Raw]]) -> None:
        self.future = future

    def answered(self, error: FabricError | None, results: list[Raw]) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(results)


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ClosedError("no event loop runs here; zfabric.Client is for code without one") from None
