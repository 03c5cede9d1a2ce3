"""How a response reads: an object with a row of items, or the events that build it
(https://platform.openai.com/docs/api-reference/responses-streaming)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zfabric.client.results import Completion
from zfabric.errors import FabricError
from zfabric.gateway import sse
from zfabric.gateway.blocks import Block, Blocks, Change, Step, blocks_of
from zfabric.gateway.call import Call
from zfabric.gateway.clock import created
from zfabric.gateway.errors import error_object, status_of
from zfabric.gateway.words import chat_logprobs, usage_object
from zfabric.wire.payloads import Delta, FinishReason

#: Of an item's id, and what its text is called in the names of events.
_PREFIX = {"reasoning": "rs", "text": "msg", "call": "fc"}
_TEXT = {"reasoning": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}


class ResponsesWording:
    """One answer.

    Args:
        shown: What it repeats of its request.
        call: Whose id it has.
    """

    def __init__(self, shown: dict[str, Any], call: Call) -> None:
        self._call = call
        self._shown = {"id": f"resp_{call.id}", "object": "response", "created_at": created(), **shown}
        self._top: int = shown["top_logprobs"]
        self._blocks = Blocks()
        self._numbered = 0
        self._finished: FinishReason | None = None
        #: Of the block that is open: its deltas are all the same but for their text and number.
        self._before = b""

    def delta(self, position: int, delta: Delta) -> bytes:
        begin = b"" if self._numbered else self._begin()
        self._finished = delta.finish_reason
        opened = self._blocks.open
        if (
            opened is not None and opened.kind == "text" and delta.text
            and not delta.reasoning and not delta.tool_calls and delta.logprobs is None
        ):  # fmt: skip
            opened.extend(delta.text)
            return begin + self._more(delta.text)
        return begin + b"".join([self._change(change, delta) for change in self._blocks.of(delta)])

    def ending(self, completions: list[Completion]) -> bytes:
        begin = b"" if self._numbered else self._begin()
        closed = b"".join([self._change(change) for change in self._blocks.close()])
        response = self._response(self._blocks.row, self._finished, self._usage(completions))
        return begin + closed + self._event(f"response.{response['status']}", response=response)

    def failure(self, error: FabricError) -> bytes:
        begin = b"" if self._numbered else self._begin()
        told = error_object(error)
        code = "rate_limit_exceeded" if status_of(error) == 429 else "server_error"
        row = [self._item(block, "incomplete") for block in self._blocks.row]
        response = {
            **self._shown, "status": "failed", "output": row, "usage": None, "incomplete_details": None,
            "error": {**told, "code": code, "fabric_error": told["code"]},
        }  # fmt: skip
        return begin + self._event("response.failed", response=response)

    def whole(self, completions: list[Completion]) -> bytes:
        choice = completions[0].choices[0]
        response = self._response(blocks_of(choice), choice.finish_reason, self._usage(completions))
        return sse.encode(response)

    # ── the object ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _response(self, row: Iterable[Block], finished: FinishReason | None, usage: dict[str, Any]) -> dict[str, Any]:
        items = list(row)
        statuses = ["completed"] * len(items)
        said: dict[str, Any] = {**self._shown, "error": None, "incomplete_details": None, "usage": usage}
        status = "completed"
        if finished == "length":
            status = "incomplete"
            said["incomplete_details"] = {"reason": "max_output_tokens"}
        elif finished == "abort":
            status = "failed"
            said["error"] = {"code": "server_error", "message": "the engine broke off"}
        if status != "completed" and items:
            statuses[-1] = "incomplete"
        output = [self._item(block, state) for block, state in zip(items, statuses, strict=True)]
        if status == "completed":
            said["completed_at"] = created()
        return {**said, "status": status, "output": output}

    def _item(self, block: Block, status: str, *, begins: bool = False) -> dict[str, Any]:
        said: dict[str, Any] = {"id": self._id(block), "status": status}
        if block.kind == "call":
            arguments = "" if begins else block.content
            return {**said, "type": "function_call", "call_id": block.id, "name": block.name, "arguments": arguments}
        content = [] if begins else [self._part(block)]
        if block.kind == "reasoning":
            return {**said, "type": "reasoning", "summary": [], "content": content}
        return {**said, "type": "message", "role": "assistant", "content": content}

    def _part(self, block: Block, *, begins: bool = False) -> dict[str, Any]:
        text = "" if begins else block.content
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if begins else self._logprobs(block.logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, entries: list[Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = chat_logprobs(entries, self._top)["content"]
        return found

    def _id(self, block: Block) -> str:
        return f"{_PREFIX[block.kind]}_{self._call.id}_{block.index}"

    def _usage(self, completions: list[Completion]) -> dict[str, Any]:
        counts = usage_object(completions)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            # Engines count all tokens of an answer together.
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self) -> bytes:
        response = {**self._shown, "status": "in_progress", "output": [], "usage": None, "error": None}
        response["incomplete_details"] = None
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _change(self, change: Change, delta: Delta | None = None) -> bytes:
        step, block, piece = change
        if step is Step.BEGUN:
            return self._opened(block)
        if step is Step.CLOSED:
            return self._closed(block)
        if block.kind == "text" and delta is not None and delta.logprobs is not None:
            logprobs = self._logprobs(delta.logprobs)
            place = {"item_id": self._id(block), "output_index": block.index, "content_index": 0}
            return self._event("response.output_text.delta", **place, delta=piece, logprobs=logprobs)
        return self._more(piece)

    def _more(self, piece: str) -> bytes:
        """The next piece of the open block: what comes once for each token."""
        number = self._numbered
        self._numbered = number + 1
        return b'%s%s,"sequence_number":%d}\n\n' % (self._before, sse.encode(piece), number)

    def _opened(self, block: Block) -> bytes:
        name = f"response.{_TEXT[block.kind]}.delta"
        place: dict[str, Any] = {"item_id": self._id(block), "output_index": block.index}
        item = self._item(block, "in_progress", begins=True)
        events = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            place["content_index"] = 0
            events += self._event("response.content_part.added", **place, part=self._part(block, begins=True))
        extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        head = sse.encode({"type": name, **place, **extra})[:-1]
        self._before = b"event: " + name.encode() + b"\ndata: " + head + b',"delta":'
        return events

    def _closed(self, block: Block) -> bytes:
        place: dict[str, Any] = {"item_id": self._id(block), "output_index": block.index}
        name = f"response.{_TEXT[block.kind]}.done"
        if block.kind == "call":
            events = self._event(name, **place, name=block.name, arguments=block.content)
        else:
            place["content_index"] = 0
            logprobs = {"logprobs": self._logprobs(block.logprobs)} if block.kind == "text" else {}
            events = self._event(name, **place, text=block.content, **logprobs)
            events += self._event("response.content_part.done", **place, part=self._part(block))
        last = block is self._blocks.row[-1]
        status = "incomplete" if last and self._finished in ("length", "abort") else "completed"
        return events + self._event(
            "response.output_item.done", output_index=block.index, item=self._item(block, status)
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        """An event with its number."""
        said = {"type": kind, "sequence_number": self._numbered, **fields}
        self._numbered += 1
        return b"event: " + kind.encode() + b"\n" + sse.event(said)
