"""What a server answers to one request, reduced to what two servers can be compared by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.compatibility.cases import Case

#: Digits after the point of log-probabilities that have to agree.
_DIGITS = 2
#: Objects whose names are tokens, and others that are not looked into.
_MAPS = ("logprobs.top_logprobs[]", "prompt_logprobs[]", "permission[]")


@dataclass
class Observed:
    """One answer.

    Attributes:
        status: Of HTTP.
        kind: "events", "json", or the content type.
        error: The object under "error"; None for an answer that is none.
        fields: Types of each field by its path, "choices[].text" for example; in a stream those of all events.
        order: What the events of each choice tell in their order, repetitions once, and the end of the stream. How many tokens
            go into one event is a matter of timing at both servers, so nothing here depends on it: an event that tells two
            things counts as two events, one that tells nothing as none, and null as no type where others have a value.
        values: What has to be the same in both: texts, reasons, counts.
    """

    status: int
    kind: str
    error: dict[str, Any] | None = None
    fields: dict[str, set[str]] = field(default_factory=dict)
    order: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


async def observe(client: httpx2.AsyncClient, root: str, case: Case) -> Observed:
    """Send a request to the server at `root`."""
    headers = {"content-type": "application/json"} if case.body is not None else {}
    response = await client.request(case.method, root + case.path, content=case.content, headers=headers)
    kind = response.headers.get("content-type", "").partition(";")[0]
    if kind == "text/event-stream":
        return of_events(response.status_code, response.text)
    if kind != "application/json":
        return Observed(response.status_code, kind or "nothing")
    body = response.json()
    told = Observed(response.status_code, "json")
    if response.status_code >= 400:
        told.error = body.get("error") if isinstance(body, dict) and isinstance(body.get("error"), dict) else {}
        return told
    _note(told.fields, body)
    told.values = _values([body])
    return told


def of_events(status: int, text: str) -> Observed:
    """What a stream of events tells."""
    told = Observed(status, "events")
    lines = [block.removeprefix("data: ") for block in text.split("\n\n") if block.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    for chunk in chunks:
        if "error" in chunk:
            told.error = chunk["error"]
        _note(told.fields, chunk)
    for kinds in told.fields.values():
        if len(kinds) > 1:
            kinds.discard("null")
    told.order = _order(lines)
    told.values = _values(chunks)
    return told


def _order(lines: list[str]) -> dict[str, str]:
    """By choice, and for what belongs to none."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line == "[DONE]":
            found.setdefault("end", []).append("[DONE]")
            continue
        chunk = json.loads(line)
        if not chunk.get("choices"):
            found.setdefault("end", []).append("error" if "error" in chunk else "usage")
        for choice in chunk.get("choices", ()):
            steps = found.setdefault(f"choice {choice['index']}", [])
            for word in _words(choice):
                if not steps or steps[-1] != word:
                    steps.append(word)
    return {name: " → ".join(steps) for name, steps in sorted(found.items())}


def _words(choice: dict[str, Any]) -> list[str]:
    """What one event of a choice tells."""
    delta = choice.get("delta", {"content": choice.get("text")})
    words = [name for name in ("role", "content", "reasoning", "tool_calls") if delta.get(name)]
    return [*words, "finish_reason"] if choice.get("finish_reason") else words


def _values(bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all events of a stream, or of the one body."""
    values: dict[str, Any] = {}
    for body in bodies:
        for choice in body.get("choices") or ():
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            at = f"of choice {choice['index']}"
            values[f"text {at}"] = values.get(f"text {at}", "") + (said.get("content") or "")
            if said.get("tool_calls"):
                values[f"calls {at}"] = [call.get("function") for call in said["tool_calls"]]
            if choice.get("finish_reason"):
                values[f"finish_reason {at}"] = choice["finish_reason"]
            for name, entries in _logprobs(choice.get("logprobs") or {}).items():
                values.setdefault(f"{name} {at}", []).extend(entries)
        usage = body.get("usage")
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            if usage and usage.get(name) is not None:
                values[f"usage.{name}"] = usage[name]
        for name in ("count", "max_model_len", "tokens", "token_strs", "prompt"):
            if name in body:
                values[name] = body[name]
        for row in body.get("data") or ():
            if "embedding" in row:
                vector = row["embedding"]
                values[f"length of vector {row['index']}"] = len(vector)
    return values


def _logprobs(told: dict[str, Any]) -> dict[str, list[Any]]:
    """Tokens with their log-probabilities, numbers of alternatives, and places in the text where they are told."""
    if "content" in told:
        entries = told["content"] or []
        tops = [entry["top_logprobs"] for entry in entries]
        tokens, values, offsets = [entry["token"] for entry in entries], [entry["logprob"] for entry in entries], []
    elif told:
        tops = told["top_logprobs"] or [None] * len(told["tokens"])
        tokens, values, offsets = told["tokens"], told["token_logprobs"], told["text_offset"]
    else:
        return {}
    rounded = [None if value is None else round(value, _DIGITS) for value in values]
    return {
        "logprobs": list(zip(tokens, rounded, strict=True)), "alternatives": [len(top or ()) for top in tops],
        "text_offset": offsets,
    }  # fmt: skip


def _note(fields: dict[str, set[str]], value: Any) -> None:
    for path, kind in _walk("", value):
        fields.setdefault(path, set()).add(kind)


def _walk(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if path.endswith(_MAPS):
            yield path, "object"
            return
        for name, item in value.items():
            yield from _walk(f"{path}.{name}" if path else name, item)
        return
    if isinstance(value, list):
        yield path, "array"
        for item in value:
            yield from _walk(f"{path}[]", item)
        return
    words = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    yield path, words[type(value)]
