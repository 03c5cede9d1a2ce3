"""What all backends do alike before an engine sees a request, and after it made something. These are for backends of your own,
too; docs/backends.md says what each is for. Nothing here imports an engine before it is used.
"""

from typing import TYPE_CHECKING, Any

from zfabric.backends.front.bounds import (
    check_logprobs,
    check_prompt_logprobs,
    context_overflow,
    fit,
    known_tokens,
)
from zfabric.backends.front.chat import chat_text
from zfabric.backends.front.continuation import Redraw, Unseen, continues
from zfabric.backends.front.embed_inputs import EmbedInputs
from zfabric.backends.front.parsing import AnswerFormat, MarkTokens, force_calls
from zfabric.backends.front.prompts import PromptTokens
from zfabric.backends.front.stop_strings import StopStrings
from zfabric.backends.front.text import TextModelWorker, text_of

if TYPE_CHECKING:
    from zfabric.backends.front.detokenizer import Detokenizer

__all__ = [
    "AnswerFormat",
    "Detokenizer",
    "EmbedInputs",
    "MarkTokens",
    "PromptTokens",
    "Redraw",
    "StopStrings",
    "TextModelWorker",
    "Unseen",
    "chat_text",
    "check_logprobs",
    "check_prompt_logprobs",
    "context_overflow",
    "continues",
    "fit",
    "force_calls",
    "known_tokens",
    "text_of",
]


def __getattr__(name: str) -> Any:
    """`Detokenizer` stands on transformers, which takes seconds to import."""
    if name != "Detokenizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zfabric.backends.front.detokenizer import Detokenizer

    return Detokenizer
