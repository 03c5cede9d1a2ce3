"""Tool calls and reasoning in what models write: one small parser for each format, and a reader of answers made of them."""

from zfabric.backends.front.parsing.answers import AnswerFormat, AnswerReader, MarkTokens, forced, template_text
from zfabric.backends.front.parsing.forcing import force_calls

__all__ = ["AnswerFormat", "AnswerReader", "MarkTokens", "force_calls", "forced", "template_text"]
