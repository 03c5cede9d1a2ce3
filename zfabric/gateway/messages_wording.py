"""How a message reads: an object with a row of blocks, or the events that build it
(https://docs.anthropic.com/en/docs/build-with-claude/streaming)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.client.results import Completion
from zfabric.errors import BackendError, FabricError, UnavailableError
from zfabric.gateway import sse
from zfabric.gateway.blocks import Block, Blocks, Change, Step, blocks_of
from zfabric.gateway.call import Call
from zfabric.gateway.errors import status_of
from zfabric.gateway.words import usage_object
from zfabric.wire.payloads import Delta, FinishReason

_STOP_REASONS: Final[dict[FinishReason | None, str]] = {"length": "max_tokens", "tool_calls": "tool_use"}
#: Of a block's kind: what its deltas are called, and what their text is.
_DELTAS: Final = {
    "reasoning": ("thinking_delta", "thinking"), "text": ("text_delta", "text"), "call": ("input_json_delta", "partial_json"),
}  # fmt: skip
#: https://docs.anthropic.com/en/api/errors
_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


class MessagesWording:
    """One answer.

    Args:
        model: As asked for.
        call: Whose id it has.
    """

    def __init__(self, model: str, call: Call) -> None:
        self._call = call
        self._model = model
        self._blocks = Blocks()
        self._begun = False
        self._finished: FinishReason | None = None
        self._stop: str | int | None = None
        self._texts = sse.TextEvents(b"", b"")

    def delta(self, position: int, delta: Delta) -> bytes:
        begin = b"" if self._begun else self._begin()
        self._finished, self._stop = delta.finish_reason, delta.stop_reason
        opened = self._blocks.open
        if opened is not None and opened.kind == "text" and delta.text and not delta.reasoning and not delta.tool_calls:
            return begin + self._texts.of(delta.text)
        return begin + b"".join([self._change(change) for change in self._blocks.of(delta)])

    def ending(self, completions: list[Completion]) -> bytes:
        if self._finished == "abort":
            return self.failure(_aborted())
        begin = b"" if self._begun else self._begin()
        closed = b"".join([self._change(change) for change in self._blocks.close()])
        stopped = _stopped(self._finished, self._stop)
        return (
            begin
            + closed
            + _event("message_delta", delta=stopped, usage=self._usage(completions))
            + _event("message_stop")
        )

    def failure(self, error: FabricError) -> bytes:
        return b"event: error\ndata: " + error_envelope(error, message_status(error), self._call.id) + b"\n\n"

    def whole(self, completions: list[Completion]) -> bytes:
        choice = completions[0].choices[0]
        if choice.finish_reason == "abort":
            raise _aborted()
        said = self._message([_block(block) for block in blocks_of(choice)], self._usage(completions))
        return sse.encode({**said, **_stopped(choice.finish_reason, choice.stop_reason)})

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._call.id}", "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": None, "stop_sequence": None, "usage": usage,
        }  # fmt: skip

    def _begin(self) -> bytes:
        self._begun = True
        # How many tokens the prompt has is told with the last delta of the engine.
        usage = {"input_tokens": 0, "output_tokens": 0}
        return _event("message_start", message=self._message([], usage)) + _event("ping")

    def _change(self, change: Change) -> bytes:
        step, block, piece = change
        if step is Step.MORE:
            return self._texts.of(piece)
        if step is Step.BEGUN:
            kind, name = _DELTAS[block.kind]
            head = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%s","%s":' % (
                block.index, kind.encode(), name.encode(),
            )  # fmt: skip
            self._texts = sse.TextEvents(head, b"}}", name=b"content_block_delta")
            return _event("content_block_start", index=block.index, content_block=_block(block, begins=True))
        signed = b""
        if block.kind == "reasoning":
            # Who checks nothing signs nothing; accumulators of SDKs want the field.
            signed = _event(
                "content_block_delta", index=block.index, delta={"type": "signature_delta", "signature": ""}
            )
        return signed + _event("content_block_stop", index=block.index)

    def _usage(self, completions: list[Completion]) -> dict[str, Any]:
        counts = usage_object(completions)
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counts["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": counts["completion_tokens"],
        }


def message_status(error: FabricError) -> int:
    """The status of an error, as this API has it: 529 where nobody is there to answer."""
    return 529 if isinstance(error, UnavailableError) else status_of(error)


def error_envelope(error: FabricError, status: int, request_id: str) -> bytes:
    """The body of an error, as Anthropic's API has it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 499 else "api_error")
    told = {"type": kind, "message": error.message, "fabric_code": error.code, "retryable": error.retryable}
    return sse.encode({"type": "error", "error": told, "request_id": request_id})


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\n" + sse.event({"type": kind, **fields})


def _stopped(finished: FinishReason | None, stop: str | int | None) -> dict[str, Any]:
    """Why an answer ended, and the caller's text that ended it, where one did."""
    if finished == "stop" and isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": _STOP_REASONS.get(finished, "end_turn"), "stop_sequence": None}


def _block(block: Block, *, begins: bool = False) -> dict[str, Any]:
    content = "" if begins else block.content
    if block.kind == "text":
        return {"type": "text", "text": content}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": content, "signature": ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _arguments(content) if content else {}}


def _arguments(text: str) -> Any:
    """The input of a call is an object here. Raises: BackendError: The model wrote none."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise BackendError(f"the arguments of a call are no JSON object: {error}") from None


def _aborted() -> BackendError:
    return BackendError("the engine broke off")
