"""What a client asks the controller, what it is answered, and what a peer is told of a message that was no use."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct

from zfabric.errors import Detail
from zfabric.wire.fields import NIL, Attempt, Name, Unsigned63


class Query(Struct, array_like=True, kw_only=True):
    """client → controller: a question about the fabric.

    Attributes:
        number: The client's own for this question; the answers have it too.
        what: Name of the question.
        arguments: By name; which, depends on the question.
    """

    number: Unsigned63
    what: Name
    arguments: Annotated[dict[Name, Any], Meta(max_length=32)] = {}


class Answer(Struct, array_like=True, kw_only=True):
    """controller → client: what was asked, or an error.

    Attributes:
        number: The question's.
        code: 0, or an error's code.
        message: What the error says, for people.
        details: The values in it, for programs.
        result: What was asked; nil with an error.
        more: Another answer with this number follows: a long list comes in parts, which are joined.
    """

    number: int
    code: int
    message: str = ""
    details: dict[str, Detail] = {}
    result: Raw = NIL
    more: bool = False


class Fault(Struct, array_like=True, kw_only=True):
    """controller → peer: your message could not be used. In REFUSED it means: and there is no session for you.

    A fault names what it answers where that could be read, and ends it: an attempt of a request, or a query.

    Attributes:
        code: An error's code.
        message: What it says, for people.
        details: The values in it, for programs.
        request: The request of the SUBMIT that could not be used.
        attempt: Which attempt of it.
        query: The number of the QUERY that could not be used.
    """

    code: int
    message: str
    details: dict[str, Detail] = {}
    request: Unsigned63 | None = None
    attempt: Attempt | None = None
    query: Unsigned63 | None = None
