"""How messages become a prompt, beside the messages themselves: what chat templates can be told."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from zfabric.errors import RequestError
from zfabric.wire.tools import check_choice

#: A chat message, as tokenizer chat templates take it: {"role": …, "content": str | parts, …}.
Message = dict[str, Any]

#: What a request may ask for that is a parameter like those of its sampling: a model announces whether it honours it.
OPTIONS: Final = (
    "tools", "response_format", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents",
    "tool_choice", "parallel_tool_calls",
)  # fmt: skip
#: Names that `chat_template_kwargs` may not have: they are options of their own, or would have a template do something else than
#: write a text.
RESERVED: Final = frozenset(
    {
        "messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "load_audio_from_video", "processor_kwargs",
    }
)  # fmt: skip


class ChatOptions(Struct, array_like=True, kw_only=True, frozen=True):
    """What a chat template is told beside messages and tools.

    Attributes:
        chat_template_kwargs: Values that the model's template knows by these names, as `enable_thinking`.
        add_generation_prompt: Whether the prompt ends with the beginning of the assistant's turn; None is true, unless
            `continue_final_message` is.
        continue_final_message: The last message is to be gone on with: the prompt ends within it.
        documents: Texts to answer from, for templates that know them: maps with a `title` and a `text`.
        tool_choice: "auto" (as None), "none", "required", or {"type": "function", "function": {"name": …}}: whether tools may be
            called, or have to be.
        parallel_tool_calls: Whether an answer may have several calls; else it has its first alone.
    """

    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    documents: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    def validate(self) -> None:
        """Raises: RequestError."""
        for name in self.chat_template_kwargs:
            if name in RESERVED:
                raise RequestError(
                    f"chat_template_kwargs has {name!r}, which is an option of its own or the worker's matter",
                    parameter="chat_template_kwargs",
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message goes on with the last message, add_generation_prompt begins another: set one of them",
                parameter="continue_final_message",
            )

    @property
    def set(self) -> list[str]:
        """Names of what is not as it is by default."""
        named = {
            "chat_template_kwargs": bool(self.chat_template_kwargs),
            "add_generation_prompt": self.add_generation_prompt is not None,
            "continue_final_message": self.continue_final_message,
            "documents": self.documents is not None,
            "tool_choice": self.forces,
            "parallel_tool_calls": not self.parallel_tool_calls,
        }
        return [name for name, given in named.items() if given]

    @property
    def forces(self) -> bool:
        """Whether the answer has to be calls."""
        return self.tool_choice not in (None, "auto", "none")

    @property
    def arguments(self) -> dict[str, Any]:
        """All of it as arguments of a template's rendering, by the names that transformers and vLLM have."""
        begins = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        found = {**self.chat_template_kwargs, "add_generation_prompt": begins}
        if self.continue_final_message:
            found["continue_final_message"] = True
        if self.documents is not None:
            found["documents"] = self.documents
        return found


#: Where nothing is said.
PLAIN: Final = ChatOptions()
#: A chat that nobody is to go on with.
WHOLE: Final = ChatOptions(add_generation_prompt=False)


def check_chat(
    chat: ChatOptions | None, messages: list[Message] | None, tools: list[dict[str, Any]] | None = None
) -> None:
    """Raises: RequestError: Options contradict one another, or stand beside a prompt that is no chat."""
    if chat is None:
        return
    chat.validate()
    check_choice(chat.tool_choice, tools)
    if messages is None and (given := chat.set):
        raise RequestError(f"{given[0]} goes with messages, there are none", parameter=given[0])


def check_response_format(wanted: dict[str, Any] | None) -> None:
    """Raises: RequestError: It asks for a JSON schema and has none, or one that is no object."""
    if not wanted or wanted.get("type") != "json_schema":
        return
    given = wanted.get("json_schema")
    if not isinstance(given, dict) or not isinstance(given.get("schema", given), dict):
        raise RequestError(
            "response_format of type 'json_schema' needs an object json_schema with the object schema",
            parameter="response_format.json_schema",
        )


def options_of(
    tools: list[dict[str, Any]] | None, chat: ChatOptions | None, response_format: dict[str, Any] | None
) -> dict[str, Any]:
    """What is asked for of `OPTIONS`, by name."""
    found: dict[str, Any] = {name: getattr(chat, name) for name in chat.set} if chat is not None else {}
    if tools:
        found["tools"] = tools
    if response_format and response_format != {"type": "text"}:
        found["response_format"] = response_format
    return found
