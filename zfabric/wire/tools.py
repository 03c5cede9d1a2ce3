"""Tools of a request, and whether their calls are asked for: as OpenAI's API has both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from zfabric.errors import RequestError

#: What `tool_choice` may be beside a function's name: {"type": "function", "function": {"name": …}}.
CHOICES: Final = ("auto", "none", "required")


def functions(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """JSON schemas of the parameters of a request's functions, by name. What is no function is left out.

    Example:
        >>> functions([{"type": "function", "function": {"name": "now"}}])
        {'now': {}}
    """
    found: dict[str, dict[str, Any]] = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            schema = function.get("parameters")
            found[name] = dict(schema) if isinstance(schema, Mapping) else {}
    return found


def check_choice(choice: str | dict[str, Any] | None, tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raises: RequestError: `tool_choice` is of no known form, or names what is not among the tools."""
    if choice is None or choice in ("auto", "none"):
        return
    name = chosen_function(choice)
    if name is None and choice != "required":
        raise RequestError(
            f"tool_choice is {choice!r}, it must be one of {', '.join(CHOICES)}, or "
            '{"type": "function", "function": {"name": …}}',
            parameter="tool_choice",
        )
    there = functions(tools)
    if not there or (name is not None and name not in there):
        told = ", ".join(there) or "none"
        raise RequestError(f"tool_choice asks for {name or 'a call'!r}, tools are {told}", parameter="tool_choice")


def chosen_function(choice: str | dict[str, Any] | None) -> str | None:
    """The name of the function that has to be called; None where any may be, or none."""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
