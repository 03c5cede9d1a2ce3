"""What a model's answers are read with, and one choice of an answer as it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from zfabric.backends.front.call_ids import call_id
from zfabric.backends.front.parsing.formats import (
    AUTO,
    HARMONY_REASONING,
    HARMONY_TOOLS,
    NONE,
    REASONING_FORMATS,
    TOOL_FORMATS,
    Schemas,
    chosen,
)  # fmt: skip
from zfabric.backends.front.parsing.harmony import Harmony
from zfabric.backends.front.parsing.json_calls import CallList, OneCall
from zfabric.backends.front.parsing.pieces import Pieces
from zfabric.backends.front.parsing.reasoning import Thinking
from zfabric.backends.front.parsing.scanning import Parser, PlainText
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.tools import functions

#: Tokens at the end of a prompt that say where its answer begins.
_TAIL_TOKENS: Final = 16
#: The same where the prompt ends within a message that the answer goes on with.
_TAIL_TOKENS_CONTINUED: Final = 512


class AnswerReader:
    """One choice of an answer as it comes: takes the engine's text, and gives out text, reasoning and calls.

    Args:
        parser: Of the model's format.
        pieces: Where the parser puts what it finds.
        calls: Whether it looks for calls in the model's own format.

    Attributes:
        held: Keep what is found until it is unset: the reader of a continued answer gets it with the next token.
    """

    __slots__ = ("_parser", "_pieces", "calls", "held")

    def __init__(self, parser: Parser, pieces: Pieces, *, calls: bool) -> None:
        self._parser = parser
        self._pieces = pieces
        self.calls = calls
        self.held = False

    @property
    def answers(self) -> bool:
        """Whether the next token is the answer's, and no longer reasoning: what a guide is for."""
        return self._parser.answers

    def read(self, delta: Delta) -> None:
        """Put what is found in a delta's text in place of that text. One that says why the answer ends is the last."""
        if delta.text:
            self._parser.feed(delta.text, self._pieces)
        if delta.finish_reason is not None:
            self._pieces.broken = delta.finish_reason != "stop"
            self._parser.finish(self._pieces)
            self._pieces.finish()
            if delta.finish_reason == "stop" and self._pieces.called:
                delta.finish_reason = "tool_calls"
        if self.held and delta.finish_reason is None:
            delta.text = ""
        else:
            self._pieces.fill(delta)


class AnswerFormat:
    """How a model writes reasoning and calls.

    Args:
        template: The text of all of its chat templates.
        tools: "auto", "none", or a name of `TOOL_FORMATS`.
        reasoning: The same of `REASONING_FORMATS`.

    Attributes:
        tools, reasoning: Names of what was chosen, None for none.
        missing: Options of a request that go beyond it: calls cannot be asked for where they are to stay text.

    Raises:
        ConfigurationError: A name that is none.

    Example:
        >>> AnswerFormat("{{ '<tool_call>' }} … arguments … </think>").details
        {'tool_parser': 'hermes', 'reasoning_parser': 'qwen3'}
    """

    def __init__(self, template: str, *, tools: str = AUTO, reasoning: str = AUTO) -> None:
        self.tools = chosen("tool_parser", tools, template, TOOL_FORMATS)
        self.reasoning = chosen("reasoning_parser", reasoning, template, REASONING_FORMATS)
        calling = {"tool_choice"} if tools == NONE else set()
        self.missing = frozenset(calling if self.tools else {*calling, "parallel_tool_calls"})

    @property
    def details(self) -> dict[str, str]:
        """What a model says of it to operators."""
        return {"tool_parser": self.tools or NONE, "reasoning_parser": self.reasoning or NONE}

    @property
    def reasoning_marks(self) -> tuple[str, ...]:
        """The tokens around reasoning."""
        if self.reasoning is None:
            return ()
        if self.reasoning == HARMONY_REASONING:
            return TOOL_FORMATS[HARMONY_TOOLS].marks
        # A name may follow the mark itself.
        return tuple(mark.removesuffix("thought") for mark in REASONING_FORMATS[self.reasoning].marks)

    def reader(
        self, request: GenerateRequest, tail: Callable[[int], str], *, index: int = 0, lead: str = ""
    ) -> AnswerReader | None:
        """What reads one choice; None where its text is all there is: of a prompt that is no chat, or a model without formats.

        Args:
            tail: The text of so many tokens at the prompt's end, special ones included.
            index: The choice.
            lead: Text that the answer begins with, which the model did not write.
        """
        chat = request.chat
        schemas = functions(request.tools)
        reads_calls = bool(schemas) and (self.tools is not None or forced(request))
        if request.messages is None or not (reads_calls or self.reasoning):
            return None
        length = TOOL_FORMATS[self.tools].id_length if self.tools else None

        def name_call(number: int) -> str:
            return call_id(request.request_id, index, number, length)

        pieces = Pieces(
            name_call,
            unseen=request.resume_characters if index == 0 else 0,
            parallel=chat is None or chat.parallel_tool_calls,
        )
        pieces.exactly(lead)
        own = bool(schemas) and self.tools is not None and not forced(request)
        return AnswerReader(self._parser(request, schemas, tail), pieces, calls=own)

    def _parser(self, request: GenerateRequest, schemas: Schemas, tail: Callable[[int], str]) -> Parser:
        rest = self._calls(request, schemas)
        if self.reasoning is None and self.tools != HARMONY_TOOLS:
            return rest
        continued = request.chat is not None and request.chat.continue_final_message
        end = tail(_TAIL_TOKENS_CONTINUED if continued else _TAIL_TOKENS)
        if self.reasoning == HARMONY_REASONING or self.tools == HARMONY_TOOLS:
            begun = end.rpartition(Harmony.START)[2].removeprefix("assistant")
            calls = bool(schemas) and self.tools == HARMONY_TOOLS and not forced(request)
            return Harmony(begun, calls=calls, rest=rest)
        assert self.reasoning is not None
        known = REASONING_FORMATS[self.reasoning]
        opened = _opened(end, known.marks, within=continued)
        return Thinking(known.marks, opened=known.opened if opened is None else opened, rest=rest)

    def _calls(self, request: GenerateRequest, schemas: Schemas) -> Parser:
        choice = request.chat.tool_choice if request.chat is not None else None
        if choice == "required":
            return CallList()
        if isinstance(choice, dict):
            return OneCall(str(choice["function"]["name"]))
        return TOOL_FORMATS[self.tools].make(schemas) if self.tools and schemas else PlainText()


def forced(request: GenerateRequest) -> bool:
    """Whether a request's answer has to be calls."""
    return request.chat is not None and request.chat.forces


def template_text(templates: Any) -> str:
    """The text of a tokenizer's chat template, or of all that it has."""
    if isinstance(templates, dict):
        return "\n".join(str(template) for template in templates.values())
    return str(templates or "")


class MarkTokens:
    """Those of a format's marks that are special tokens of a tokenizer, which a text usually lacks.

    Args:
        form: The format.
        tokenizer: Of transformers, or one with its `added_tokens_decoder`.
    """

    def __init__(self, form: AnswerFormat, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        special = {int(token): str(known) for token, known in added.items() if known.special}
        tools = TOOL_FORMATS[form.tools].marks if form.tools else ()
        self._thinking = {token: text for token, text in special.items() if text in form.reasoning_marks}
        self._calling = {token: text for token, text in special.items() if text in {*form.reasoning_marks, *tools}}

    def of(self, reader: AnswerReader | None) -> Mapping[int, str]:
        """Tokens that a reader has to see, with their texts."""
        if reader is None:
            return {}
        return self._calling if reader.calls else self._thinking


def _opened(tail: str, marks: tuple[str, str], *, within: bool) -> bool | None:
    """Whether a prompt ends within reasoning; None where it says nothing of it.

    Args:
        within: It ends within a message, whose own text may have the marks anywhere; else they stand at its end.
    """
    opened, closed = (tail.rfind(mark) for mark in marks)
    if not within:
        end = tail.rstrip()
        if end.endswith(marks[1]):
            return False
        return True if end.endswith(marks[0]) else None
    return None if opened == closed else opened > closed
