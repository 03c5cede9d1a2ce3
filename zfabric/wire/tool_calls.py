"""Tool calls in parts, as an engine makes them."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, structs


class ToolCallDelta(Struct, array_like=True, kw_only=True, gc=False):
    """A piece of a tool call. The first piece of a call has its id and its whole name; arguments come bit by bit.

    Attributes:
        index: Which call of its choice, from 0.
        id: What the result is to name as `tool_call_id`; None on all pieces but the first.
        name: The function's; None on all pieces but the first.
        arguments: The next part of a JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


def joined_calls(pieces: Sequence[ToolCallDelta]) -> list[ToolCallDelta] | None:
    """Pieces of calls in their order, those of one call that follow one another as one piece; None for no pieces."""
    joined: list[ToolCallDelta] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        if joined and joined[-1].index == piece.index and piece.id is None and piece.name is None:
            arguments[-1].append(piece.arguments)
        else:
            joined.append(structs.replace(piece))
            arguments.append([piece.arguments])
    for call, parts in zip(joined, arguments, strict=True):
        call.arguments = "".join(parts)
    return joined or None
