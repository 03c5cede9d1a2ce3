"""Answers that follow a JSON schema, a regular expression, a list of choices or a grammar, through llguidance.

A guide knows at each place which tokens may come; the others are banned before the draw. When the text is whole, all that
is left is the end.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Sequence
from typing import Any, Final

from zfabric.errors import BackendError, ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.wire.payloads import GenerateRequest

#: Sampling parameters that a guide stands behind.
GUIDED: Final = frozenset({"guided_json", "guided_regex", "guided_choice", "guided_grammar"})
_BITS: Final = 32
#: What a message of the library may take of an error's text.
_MESSAGE_LENGTH_MAX: Final = 300


def guidable(tokenizer: Any) -> bool:
    """Whether guides can be made: the library is there, the vocabulary can be read, and a text can end."""
    return (
        importlib.util.find_spec("llguidance") is not None
        and hasattr(tokenizer, "backend_tokenizer")
        and tokenizer.eos_token_id is not None
    )


class Guide:
    """Follows one answer.

    Args:
        matcher: Of llguidance, at the beginning of a text.
        words: 32-bit words of a mask over the vocabulary.

    Attributes:
        matcher, words: As given, for `GuideMasks`.
        failure: Set when it cannot go on: no token may come, or a bound of the library is reached.
        waits: Set while the model reasons: its answer is what has to follow.
    """

    __slots__ = ("failure", "matcher", "waits", "words")

    def __init__(self, matcher: Any, words: int) -> None:
        self.matcher, self.words = matcher, words
        self.failure: BackendError | None = None
        self.waits = False

    def take(self, token: int) -> bool:
        """Enter a drawn token that does not end the answer. Returns whether the text is whole and cannot go on."""
        if self.waits:
            return False
        self.matcher.consume_token(token)
        self.note_failure()
        return bool(self.matcher.is_stopped())

    def note_failure(self) -> None:
        """Look whether it gave up."""
        if self.matcher.is_error():
            self.failure = BackendError(f"the guide of this answer gave up: {_first_line(self.matcher.get_error())}")


class StructuredOutputs:
    """Makes guides; the vocabulary is read at the first one.

    Args:
        tokenizer: A transformers tokenizer.
        vocabulary_size: Of the model's logits.
        end_tokens: What ends an answer.
    """

    def __init__(self, tokenizer: Any, *, vocabulary_size: int, end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self.end_tokens = end_tokens
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def make(self, request: GenerateRequest) -> Guide | None:
        """The guide of one choice; None if the request wants none.

        Raises:
            UnsupportedParameterError: A guide is wanted, and cannot be made.
            ParameterRangeError: It is not a schema, expression or grammar.
            RequestError: The response format is none that is known.
        """
        wanted = _wanted(request)
        if wanted is None:
            return None
        name, value = wanted
        if not guidable(self._tokenizer):
            raise UnsupportedParameterError(
                f"parameter {name!r} needs llguidance and a fast tokenizer with an end token", parameter=name
            )
        import llguidance

        try:
            grammar = _grammar(llguidance.LLMatcher, name, value)
        except ValueError as error:
            raise _refusal(name, str(error)) from None
        matcher = llguidance.LLMatcher(self._known_vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(name, matcher.get_error())
        return Guide(matcher, -(-self._vocabulary_size // _BITS))

    def _known_vocabulary(self) -> Any:
        with self._lock:
            if self._vocabulary is None:
                from llguidance.hf import from_tokenizer

                self._vocabulary = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocabulary_size, eos_token=sorted(self.end_tokens) or None
                )
            return self._vocabulary


def _wanted(request: GenerateRequest) -> tuple[str, Any] | None:
    """Name and value of the guide that a request asks for, by its sampling parameters or by its response format."""
    for name in sorted(GUIDED):
        value = getattr(request.sampling, name)
        if value:
            return name, value
    chosen = request.response_format or {"type": "text"}
    kind = chosen.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return "guided_json", '{"type": "object"}'
    if kind == "json_schema":
        wanted = chosen.get("json_schema")
        schema = wanted.get("schema") if isinstance(wanted, dict) else None
        if isinstance(schema, dict):
            return "guided_json", json.dumps(schema)
    raise RequestError(
        f"response_format is of type {kind!r}, it must be text, json_object or json_schema with a schema"
    )


def _grammar(matcher: Any, name: str, value: Any) -> str:
    """Raises: ValueError if it is not even JSON."""
    if name == "guided_json":
        return str(matcher.grammar_from_json_schema(value, overrides={"whitespace_flexible": False}))
    if name == "guided_regex":
        return str(matcher.grammar_from_regex(value))
    return str(matcher.grammar_from_lark(_choice(value) if name == "guided_choice" else value))


def _choice(texts: Sequence[str]) -> str:
    """A grammar of these texts alone; its strings are written as in JSON."""
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _refusal(name: str, message: str) -> ParameterRangeError:
    line = _first_line(message)
    return ParameterRangeError(f"{name} cannot be followed: {line}", parameter=name, value=line)


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:_MESSAGE_LENGTH_MAX]
