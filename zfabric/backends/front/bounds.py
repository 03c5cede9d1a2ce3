"""What a request may ask for, whoever serves it: text, tokens, images, log-probabilities. All bounds are kept before any work is
done, by all backends, and they are all here.

A text of so many characters that it cannot fit, whatever its tokens, is known without its tokens, which take time and memory in
proportion to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from zfabric.errors import ContextOverflowError, ParameterRangeError, RequestError, TooLargeError
from zfabric.limits import IMAGE_PIXELS_MAX, IMAGES_MAX, PROMPT_LOGPROBS_MAX
from zfabric.wire.chat import Message
from zfabric.wire.parts import IMAGES
from zfabric.wire.sampling import SamplingParams

#: No tokenizer's longest token is shorter, as far as bounds are concerned.
_LONGEST_MIN: Final = 16
#: So much more of a text is read than its first tokens can need: where it is cut, tokens come out otherwise.
_SLACK: Final = 2

# ── text and tokens ─────────────────────────────────────────────────────────────────────────────────────────────────


def what_may_fit(given: Any, size: int, length: int | None, *, truncate: bool) -> Any:
    """What may fit of a text, or of tokens.

    Args:
        size: Of the longest token.
        length: Tokens that fit.
    """
    if length is None or len(given) <= size * length:
        return given
    if truncate:
        return given[len(given) - size * length :]
    raise context_overflow(-(-len(given) // size), length)


def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token, or more: a text of n tokens has n times as many at most."""
    return max(_LONGEST_MIN, max(map(len, tokenizer.get_vocab()), default=0))


def known_tokens(token_ids: Sequence[int], vocabulary_size: int) -> list[int]:
    """A copy of tokens that the model has vectors for.

    Raises:
        RequestError: It has none for one of them.
    """
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocabulary_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocabulary_size)
        raise RequestError(f"token id {wrong} is outside of the vocabulary of {vocabulary_size}", token_id=wrong)
    return list(token_ids)


def fit(tokens: list[int], length: int, *, truncate: bool) -> list[int]:
    """The prompt, if it leaves room for one token at least; else its end, if that is allowed.

    Raises:
        ContextOverflowError: It does not fit.
    """
    if len(tokens) < length:
        return tokens
    if truncate:
        return tokens[len(tokens) - length + 1 :]
    raise context_overflow(len(tokens), length)


def context_overflow(tokens: int, length: int) -> ContextOverflowError:
    """The error of a prompt of so many tokens, or more, that does not fit a context of such a length."""
    return ContextOverflowError(
        f"prompt of {tokens} tokens leaves no room for an answer, context is {length}",
        prompt_tokens=tokens,
        context_length=length,
    )


def check_messages(messages: Sequence[Message], size: int, length: int) -> None:
    """Refuse messages that no template makes fit: what others than the assistant say is in every prompt.

    Args:
        size: Of the longest token.
        length: Tokens that fit.

    Raises:
        ContextOverflowError: Their text alone is too long.
    """
    contents = [message.get("content") for message in messages if message.get("role") != "assistant"]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    characters = sum([len(text) for text in texts if isinstance(text, str)])
    if characters > size * length:
        raise context_overflow(-(-characters // size), length)


def check_pair(query: str, document: str, size: int, length: int) -> None:
    """Refuse two texts that do not fit together. Raises: ContextOverflowError."""
    characters = len(query) + len(document)
    if characters > size * length:
        raise context_overflow(-(-characters // size), length)


def text_to_embed(text: str, owner: int, size: int, length: int, truncate: str) -> str:
    """What has to be read of an input for a vector.

    Args:
        owner: Number of the input, for errors.
        size: Of the longest token.
        length: Tokens that fit.
        truncate: As of the request.

    Raises:
        ContextOverflowError: It is too long, and may be neither cut nor chunked.
    """
    if truncate == "chunk" or len(text) <= size * length:
        return text
    if truncate == "cut":
        return text[: _SLACK * size * length]
    raise input_overflow(owner, -(-len(text) // size), length)


def input_overflow(owner: int, tokens: int, length: int) -> ContextOverflowError:
    """The error of an input of so many tokens, or more, that does not fit a context of such a length."""
    return ContextOverflowError(
        f"input {owner} has {tokens} tokens, context is {length}",
        input=owner,
        prompt_tokens=tokens,
        context_length=length,
    )


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def image_parts(messages: Sequence[Message]) -> list[Any]:
    """Parts of messages that are images, as many as there may be. Raises: TooLargeError."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    found = [part for part in parts if isinstance(part, dict) and part.get("type") in IMAGES]
    if len(found) > IMAGES_MAX:
        raise TooLargeError(f"the messages have {len(found)} images, {IMAGES_MAX} are allowed", images=len(found))
    return found


def check_pixels(images: Sequence[Any]) -> None:
    """Refuse images that are too large together, by what their headers say. Raises: TooLargeError."""
    pixels = sum(image.width * image.height for image in images)
    if pixels > IMAGE_PIXELS_MAX:
        raise TooLargeError(f"the images have {pixels} pixels, {IMAGE_PIXELS_MAX} are allowed", pixels=pixels)


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────────────────────────


def check_logprobs(sampling: SamplingParams, most: int) -> None:
    """Raises: ParameterRangeError if log-probabilities of more alternatives are wanted than a worker gives."""
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(sampling, name)
        if wanted is not None and wanted > most:
            raise ParameterRangeError(
                f"{name} is {wanted}, it must be at most {most}, which the worker sets by --max-logprobs",
                parameter=name,
                value=str(wanted),
            )


def check_prompt_logprobs(wanted: int | None, tokens: int) -> None:
    """Raises: ParameterRangeError if those of a prompt would be more than go out in one piece."""
    entries = 0 if wanted is None else (wanted + 1) * tokens
    if entries > PROMPT_LOGPROBS_MAX:
        raise ParameterRangeError(
            f"prompt_logprobs is {wanted}, it must be at most {PROMPT_LOGPROBS_MAX // tokens - 1} for a prompt of "
            f"{tokens} tokens",
            parameter="prompt_logprobs",
            value=str(wanted),
        )
