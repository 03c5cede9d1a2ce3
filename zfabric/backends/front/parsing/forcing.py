"""Calls that a request asks for are forced by a guide: a JSON schema made of its tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from msgspec import structs

from zfabric.errors import RequestError
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.tools import chosen_function, functions

_GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def force_calls(request: GenerateRequest) -> None:
    """Where `tool_choice` asks for calls, have the sampling's guide see to it: a list of calls, or the arguments of one.

    Both are plain JSON, whatever the model's own format of calls, as vLLM has it too.

    Raises:
        RequestError: The answer is to follow something else besides.
    """
    chat = request.chat
    if chat is None or not chat.forces:
        return
    others = [name for name in _GUIDES if getattr(request.sampling, name)]
    if request.response_format not in (None, {"type": "text"}):
        others.append("response_format")
    if others:
        raise RequestError(f"tool_choice forces a call, which cannot follow {others[0]} as well", parameter=others[0])
    schemas = functions(request.tools)
    name = chosen_function(chat.tool_choice)
    schema = calls_schema(schemas, parallel=chat.parallel_tool_calls) if name is None else _arguments(schemas[name])
    request.sampling = structs.replace(request.sampling, guided_json=json.dumps(schema, ensure_ascii=False))


def calls_schema(schemas: Mapping[str, Mapping[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls.

    Args:
        schemas: Of the functions' parameters, by name.
        parallel: Whether there may be several.

    Raises:
        RequestError: Two functions define different things by one name.
    """
    definitions: dict[str, Any] = {}
    items = []
    for name, schema in schemas.items():
        arguments = _arguments(schema)
        for key in ("$defs", "definitions"):
            for defined, meaning in (arguments.pop(key, None) or {}).items():
                # References in a schema begin at its root, which is another one now.
                place = definitions.setdefault(key, {})
                if place.setdefault(defined, meaning) != meaning:
                    raise RequestError(f"two tools have different definitions of {defined!r}", parameter="tools")
        items.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [name]}, "parameters": arguments},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    bounds = {"minItems": 1} if parallel else {"minItems": 1, "maxItems": 1}
    return {"type": "array", **bounds, "items": {"anyOf": items}, **definitions}


def _arguments(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object even where nothing is said of them."""
    return (
        {"type": "object", **schema} if schema else {"type": "object", "properties": {}, "additionalProperties": False}
    )
