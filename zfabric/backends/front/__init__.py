"""What all backends do alike before an engine sees a request. These are for backends of your own, too:

`TextModelWorker` is a base for engines that make text from text; `StopStrings` finds stop strings in pieces of text;
`Unseen` leaves out what the reader of a continued answer has; `text_of` is the text of a chat message; `fit`, `known_tokens` and
`context_overflow` hold a prompt's tokens against a model's bounds.
"""

from zfabric.backends.front.continuation import Unseen
from zfabric.backends.front.prompts import context_overflow, fit, known_tokens
from zfabric.backends.front.stop_strings import StopStrings
from zfabric.backends.front.text import TextModelWorker, text_of

__all__ = ["StopStrings", "TextModelWorker", "Unseen", "context_overflow", "fit", "known_tokens", "text_of"]
