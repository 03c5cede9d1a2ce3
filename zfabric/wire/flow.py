"""What is said of requests while they run: what a stream may send, and what is not wanted any more."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from zfabric.limits import LIST_LENGTH_MAX
from zfabric.wire.fields import Attempt, Unsigned32, Unsigned63


class Cancel(Struct, array_like=True, gc=False):
    """client → controller: these requests are no longer wanted.

    Attributes:
        requests: Numbers of the requests, whatever attempt of them runs.
    """

    requests: Annotated[list[Unsigned63], Meta(max_length=LIST_LENGTH_MAX)]


class CreditLine(Struct, array_like=True, kw_only=True, gc=False):
    """What one stream may send.

    Attributes:
        request: Whose credit it is.
        attempt: Which attempt of it; for another one than runs, the line means nothing.
        next: The first unit that the reader lacks: what is before it may be forgotten.
        window: Units that may be sent, counted from the answer's start. It only grows: a smaller one means nothing.
        again: The way to the reader is new: send from `next` on. Only a controller sets it; a client's is not looked at.
    """

    request: Unsigned63
    attempt: Attempt
    next: Unsigned32
    window: Unsigned32
    again: bool = False


class Credit(Struct, array_like=True, gc=False):
    """client → controller: credit for streams.

    Attributes:
        lines: One for each stream.
    """

    lines: Annotated[list[CreditLine], Meta(max_length=LIST_LENGTH_MAX)]


class Grant(Struct, array_like=True, kw_only=True, gc=False):
    """controller → worker: credit of one client.

    Attributes:
        client: Number of the client's session, which the chunks of lines with `again` carry from now on.
        instance: The client's.
        lines: One for each stream.
    """

    client: Unsigned32
    instance: Unsigned63
    lines: list[CreditLine]


class Abort(Struct, array_like=True, kw_only=True, gc=False):
    """controller → worker: stop these attempts of one client. Each still gets its terminal.

    Attributes:
        instance: The client's.
        attempts: Pairs of request and attempt.
    """

    instance: Unsigned63
    attempts: list[tuple[Unsigned63, Attempt]]
