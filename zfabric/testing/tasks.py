"""The operations with one result beside those that everything else is tried with: how they are asked, made and judged."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from zfabric.client.aio import AsyncClient
from zfabric.wire.fields import Operation
from zfabric.wire.payloads import AnyRequest, CountRequest
from zfabric.wire.tasks import (
    ClassifyRequest,
    ClassifyResult,
    DetokenizeRequest,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)


class Task(NamedTuple):
    """One operation.

    Attributes:
        request: What a client sends, for the prompt that tells the engine what to do.
        prompt: That prompt, read from the request.
        made: What the engine hands over for a request's number.
        read: What the client library gives its caller for it.
        call: Asks by the client library: for a model, with a prompt.
    """

    request: Callable[[str], AnyRequest]
    prompt: Callable[[Any], str]
    made: Callable[[int], Any]
    read: Callable[[int], Any]
    call: Callable[..., Awaitable[Any]]


def _codes(prompt: str) -> list[int]:
    """A text as numbers; what no text may hold is none that a token has."""
    return [2**70 if 0xD800 <= ord(letter) < 0xE000 else ord(letter) for letter in prompt]


def _vector(number: int) -> EmbedTokensResult:
    return EmbedTokensResult(tokens=[1], dimensions=1, data=struct.pack("<f", number))


async def _vectors(client: AsyncClient, model: str, prompt: str, **options: Any) -> object:
    [rows] = await client.embed_tokens(model, [prompt], **options)
    return rows.tolist()


async def _classes(client: AsyncClient, model: str, prompt: str, **options: Any) -> object:
    return [list(row) for row in await client.classify(model, [prompt], **options)]


TASKS: Final[dict[Operation, Task]] = {
    "tokenize": Task(
        lambda prompt: CountRequest(prompt=prompt),
        lambda request: request.prompt,
        lambda number: [number],
        lambda number: [number],
        AsyncClient.tokenize,
    ),
    "detokenize": Task(
        lambda prompt: DetokenizeRequest(token_ids=_codes(prompt)),
        lambda request: "".join(map(chr, request.token_ids)),
        str,
        str,
        lambda client, model, prompt, **options: client.detokenize(model, _codes(prompt), **options),
    ),
    "score": Task(
        lambda prompt: ScoreRequest(query=prompt, documents=["d"]),
        lambda request: request.query,
        lambda number: [float(number)],
        lambda number: [float(number)],
        lambda client, model, prompt, **options: client.score(model, prompt, ["d"], **options),
    ),
    "classify": Task(
        lambda prompt: ClassifyRequest(inputs=[prompt]),
        lambda request: request.inputs[0],
        lambda number: ClassifyResult([[1.0 / number]], ["it"]),
        lambda number: [[1.0 / number]],
        _classes,
    ),
    "reward": Task(
        lambda prompt: RewardRequest(inputs=[prompt]),
        lambda request: request.inputs[0],
        lambda number: [[float(number)]],
        lambda number: [[float(number)]],
        lambda client, model, prompt, **options: client.reward(model, [prompt], **options),
    ),
    "embed_tokens": Task(
        lambda prompt: EmbedTokensRequest(inputs=[prompt]),
        lambda request: request.inputs[0],
        _vector,
        lambda number: [[float(number)]],
        _vectors,
    ),
}
#: In place of every request of that kind but one in seven stands one of these: runs are drawn as they were before there were
#: these, and each seed still shows what it showed.
_DRAWN: Final[Operation] = "count_tokens"
_TURNS: Final[tuple[Operation, ...]] = (_DRAWN, *TASKS)


def in_turn(operation: Operation, turn: int) -> Operation:
    """What an operation that was drawn stands for."""
    return _TURNS[turn % len(_TURNS)] if operation == _DRAWN else operation


def with_tasks(capabilities: list[str]) -> list[str]:
    """Capabilities with all of these, where there is what stands for them."""
    return [*capabilities, *TASKS] if _DRAWN in capabilities else capabilities
