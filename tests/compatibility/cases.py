"""The requests that are sent to both servers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

#: The names that both servers give to their models.
MODEL: Final = "tiny"
EMBEDDER: Final = "minilm"

HI: Final[list[dict[str, Any]]] = [{"role": "user", "content": "hi"}]
TALK: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "Hello."}, *HI,
]  # fmt: skip
SCHEMA: Final = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CALLED: Final[list[dict[str, Any]]] = [
    *HI,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "3"},
]
_CHAT: Final[dict[str, Any]] = {"model": MODEL, "messages": HI, "max_tokens": 8, "temperature": 0}
_OLD: Final[dict[str, Any]] = {"model": MODEL, "prompt": "Hello there", "max_tokens": 8, "temperature": 0}
_COUNTED: Final[dict[str, Any]] = {"stream": True, "stream_options": {"include_usage": True}}
_ALWAYS: Final = {"include_usage": True, "continuous_usage_stats": True}


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        name: What the page calls it.
        path: Where it goes.
        body: JSON of the body, or its bytes as they are; None is no body.
        method: Of HTTP.
    """

    name: str
    path: str
    body: Any = None
    method: str = "POST"

    @property
    def content(self) -> bytes | None:
        """The bytes of the body."""
        return self.body if self.body is None or isinstance(self.body, bytes) else json.dumps(self.body).encode()


def chat(name: str, **fields: Any) -> Case:
    """A chat of one short message; a field of None is left out."""
    return Case(f"chat: {name}", "/v1/chat/completions", _given({**_CHAT, **fields}))


def old(name: str, **fields: Any) -> Case:
    """A completion of a short text; a field of None is left out."""
    return Case(f"completions: {name}", "/v1/completions", _given({**_OLD, **fields}))


def embed(name: str, **fields: Any) -> Case:
    """Vectors of a short text."""
    return Case(f"embeddings: {name}", "/v1/embeddings", _given({"model": EMBEDDER, "input": "a cat", **fields}))


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


CHATS: Final = (
    chat("one message"),
    chat("several turns", messages=TALK),
    chat("stream", stream=True),
    chat("stream with usage", **_COUNTED),
    chat("stream with usage in each event", stream=True, stream_options=_ALWAYS),
    chat("stream of two", n=2, seed=1, temperature=1.0, stream=True),
    chat("two choices", n=2, seed=1, temperature=1.0),
    chat("max_completion_tokens", max_tokens=None, max_completion_tokens=3),
    chat("one token", max_tokens=1),
    chat("stream of one token", max_tokens=1, stream=True),
    chat("no token", max_tokens=0),
    chat("length below zero", max_tokens=-1),
    chat("length beyond the context", max_tokens=100_000),
    chat("without a length", max_tokens=None, ignore_eos=True),
    chat("logprobs", logprobs=True),
    chat("top_logprobs", logprobs=True, top_logprobs=2),
    chat("stream of top_logprobs", logprobs=True, top_logprobs=2, max_tokens=3, stream=True),
    chat("too many top_logprobs", logprobs=True, top_logprobs=50),
    chat("top_logprobs alone", top_logprobs=2),
    chat("stop that is met", stop=["a", "e", "Z", "`"], max_tokens=60),
    chat("five stops", stop=["1", "2", "3", "4", "5"]),
    chat("stop as a text", stop="never met"),
    chat("seed", seed=7, temperature=1.0),
    chat("logit_bias", logit_bias={"70": 100}),
    chat("logit_bias of no token", logit_bias={"x": 1}),
    chat("logit_bias beyond the vocabulary", logit_bias={"100000": 1}),
    chat("penalties", frequency_penalty=0.5, presence_penalty=0.5),
    chat("penalty out of range", frequency_penalty=9.0),
    chat("temperature below zero", temperature=-1),
    chat("top_p out of range", top_p=1.5),
    chat("n of zero", n=0),
    chat("user, store, metadata", user="me", store=False, metadata={"a": "b"}),
    chat("json_object", response_format={"type": "json_object"}, max_tokens=30, logit_bias={"223": -100}),
    chat(
        "json_schema", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        max_tokens=30, logit_bias={str(token): -100 for token in (*range(198, 207), 223)},
    ),
    chat("response_format text", response_format={"type": "text"}),
    chat("response_format unknown", response_format={"type": "yaml"}),
    chat("json_schema without schema", response_format={"type": "json_schema"}),
    chat("tools", tools=[TOOL]),
    chat("tools, choice none", tools=[TOOL], tool_choice="none"),
    chat("tools, choice unknown", tools=[TOOL], tool_choice="maybe"),
    chat("tool_choice without tools", tool_choice="auto"),
    chat("a tool's result", messages=CALLED, tools=[TOOL]),
    chat("parts of text", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
    chat("parts of an unknown kind", messages=[{"role": "user", "content": [{"type": "smell", "smell": "rose"}]}]),
    chat("role developer", messages=[{"role": "developer", "content": "Be brief."}, *HI]),
    chat("role unknown", messages=[{"role": "pirate", "content": "Arr."}]),
    chat("message without role", messages=[{"content": "hi"}]),
    chat("message without content", messages=[{"role": "user"}]),
    chat("no messages", messages=[]),
    chat("messages as a text", messages="hi"),
    chat("unicode", messages=[{"role": "user", "content": "día 世界 🙂 \u0000 \\ \""}]),
    chat("too long a prompt", messages=[{"role": "user", "content": "x" * 600}]),
    chat("unknown model", model="nobody"),
    chat("no model", model=None),
    chat("model as a number", model=3),
    chat("unknown field", warp_speed=9),
    chat("stream as a text", stream="maybe"),
    chat("max_tokens as a text", max_tokens="many"),
    chat("stream_options without stream", stream_options={"include_usage": True}),
    chat("stream of an error", stream=True, messages=[{"role": "user", "content": "x" * 600}]),
    chat("stream of an unknown model", stream=True, model="nobody"),
)  # fmt: skip

COMPLETIONS: Final = (
    old("one text"),
    old("default length", max_tokens=None),
    old("stream", stream=True),
    old("stream with usage", **_COUNTED),
    old("stream with usage in each event", stream=True, stream_options=_ALWAYS),
    old("tokens", prompt=[40, 41, 42]),
    old("two texts", prompt=["Hello", "there"]),
    old("two lists of tokens", prompt=[[40, 41], [42]]),
    old("stream of two texts", prompt=["Hello", "there"], stream=True),
    old("two texts, two choices", prompt=["Hello", "there"], n=2, seed=1, temperature=1.0),
    old("empty text", prompt=""),
    old("empty list", prompt=[]),
    old("list of an empty text", prompt=[""]),
    old("no prompt", prompt=None),
    old("mixed prompt", prompt=["Hello", 3]),
    old("token beyond the vocabulary", prompt=[100_000]),
    old("token below zero", prompt=[-1]),
    old("no token", max_tokens=0),
    old("one token", max_tokens=1),
    old("echo", echo=True),
    old("echo, no token", echo=True, max_tokens=0),
    old("echo with logprobs", echo=True, logprobs=1, max_tokens=2),
    old("logprobs", logprobs=2),
    old("logprobs of zero", logprobs=0),
    old("logprobs below zero", logprobs=-2),
    old("too many logprobs", logprobs=100),
    old("stream of logprobs", logprobs=1, stream=True, max_tokens=3),
    old("suffix", suffix=" and"),
    old("best_of", best_of=2, seed=1, temperature=1.0),
    old("stop that is met", stop=["a", "e", "Z", "`"], max_tokens=60),
    old("stop_token_ids, min_tokens", stop_token_ids=[70], min_tokens=2),
    old("seed and top_k", seed=3, top_k=5, temperature=1.0),
    old("guided choice", structured_outputs={"choice": ["yes", "no"]}, max_tokens=20),
    old("too long a prompt", prompt="x" * 600),
    old("prompt and length beyond the context", prompt="x" * 500, max_tokens=100),
    old("unknown model", model="nobody"),
    old("unknown field", warp_speed=9),
    old("user and service_tier", user="me"),
)

OTHERS: Final = (
    embed("one text"),
    embed("two texts", input=["a cat", "a dog"]),
    embed("tokens", input=[101, 1037, 102]),
    embed("base64", encoding_format="base64"),
    embed("dimensions", dimensions=64),
    embed("dimensions of zero", dimensions=0),
    embed("encoding unknown", encoding_format="hex"),
    embed("empty text", input=""),
    embed("empty list", input=[]),
    embed("no input", input=None),
    embed("too long a text", input="word " * 1_000),
    embed("unknown model", model="nobody"),
    embed("user", user="me"),
    Case("tokenize: a text", "/tokenize", {"model": MODEL, "prompt": "día"}),
    Case("tokenize: messages", "/tokenize", {"model": MODEL, "messages": HI}),
    Case("tokenize: token_strs", "/tokenize", {"model": MODEL, "prompt": "hi", "return_token_strs": True}),
    Case("tokenize: nothing", "/tokenize", {"model": MODEL}),
    Case("tokenize: unknown model", "/tokenize", {"model": "nobody", "prompt": "hi"}),
    Case("detokenize", "/detokenize", {"model": MODEL, "tokens": [40, 41]}),
    Case("detokenize: beyond the vocabulary", "/detokenize", {"model": MODEL, "tokens": [100_000]}),
    Case("models", "/v1/models", method="GET"),
    Case("models: unknown", "/v1/models/nobody", method="GET"),
    Case("HTTP: unknown path", "/v1/nothing", {}),
    Case("HTTP: GET of a chat", "/v1/chat/completions", method="GET"),
    Case("HTTP: POST of models", "/v1/models", {}),
    Case("HTTP: health", "/health", method="GET"),
    Case("JSON: broken off", "/v1/chat/completions", b'{"model": "tiny", "messages": ['),
    Case("JSON: a list", "/v1/chat/completions", []),
    Case("JSON: a null", "/v1/chat/completions", b"null"),
    Case("JSON: no body", "/v1/chat/completions"),
    Case("JSON: not UTF-8", "/v1/chat/completions", b'{"model": "\xff"}'),
    Case("JSON: NaN", "/v1/completions", b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "temperature": NaN}'),
)

CASES: Final = (*CHATS, *COMPLETIONS, *OTHERS)
