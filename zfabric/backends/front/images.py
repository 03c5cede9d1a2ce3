"""Images in chat messages: taken from the request itself, never fetched from anywhere."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Sequence
from typing import Any, Final

from zfabric.backends.front.bounds import check_pixels, image_parts
from zfabric.backends.front.chat import chat_text, is_image, parts_of
from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.wire.chat import ChatOptions, Message

#: Media that have one entry per token of the prompt.
PER_TOKEN: Final = "token_type_ids"


def has_images(messages: Sequence[Message] | None) -> bool:
    """Whether any part of any message is an image."""
    return any(is_image(part) for message in messages or () for part in parts_of(message))


def see(
    processor: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    chat: ChatOptions | None = None,
) -> tuple[list[int], dict[str, Any]]:
    """Tokens of messages with images, and the images as arguments of the model.

    Args:
        processor: A transformers processor; None if the model takes no images.

    Raises:
        UnsupportedOperationError: The model takes no images.
        RequestError: An image is neither bytes nor a data URI, or cannot be read; or the template refuses the messages.
        TooLargeError: There are too many images, or too many pixels.
    """
    if processor is None:
        raise UnsupportedOperationError("this model takes no images", operation="generate")
    images = _decoded_all(open_images(messages))
    image = str(getattr(processor, "image_token", None) or "<image>")
    text = chat_text(tokenizer, messages, tools, chat=chat, image=image)
    try:
        made = dict(processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))
    except (ValueError, TypeError, OSError) as error:
        raise RequestError(f"the model's processor refuses these images: {error}") from None
    tokens: list[int] = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    return tokens, made


def key_of(media: dict[str, Any]) -> str:
    """What tells images, as arguments of a model, from others; which tokens are theirs is no part of it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(media.items()):
        if name.endswith(PER_TOKEN):
            continue
        digest.update(f"{name} {getattr(value, 'shape', value)} ".encode())
        if hasattr(value, "numpy"):
            digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


def open_images(messages: Sequence[Message], *, addresses: bool = False) -> list[Any]:
    """Images of messages of which nothing but the head is read, if they are not too many and not too large together.

    Args:
        addresses: Leave out those that are addresses, which somebody else fetches.

    Raises:
        RequestError: One is neither bytes nor a data URI, or cannot be read.
        TooLargeError: There are too many, or they have too many pixels.
    """
    parts = [part for part in image_parts(messages) if not (addresses and _is_address(_value(part)))]
    images = [_open(part) for part in parts]
    check_pixels(images)
    return images


def _value(part: dict[str, Any]) -> Any:
    value = part.get("image", part.get("image_url"))
    return value.get("url") if isinstance(value, dict) else value


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value[:5].lower() != "data:"


def _open(part: dict[str, Any]) -> Any:
    """The image of a part: {"type": "image", "image": …} or {"type": "image_url", "image_url": {"url": …}}."""
    from PIL import Image

    value = _value(part)
    data = _decoded(value) if isinstance(value, str) else value
    if not isinstance(data, bytes):
        raise RequestError(f"an image is {type(value).__name__}, it must be bytes or a data URI")
    try:
        # What is there, and how large: nothing is decoded yet.
        return Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"an image cannot be read: {error}") from None


def _decoded_all(images: Sequence[Any]) -> list[Any]:
    """The images of one request, as pixels."""
    from PIL import Image

    try:
        return [image.convert("RGB") for image in images]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"an image cannot be read: {error}") from None


def _decoded(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise RequestError("an image is a text that is no base64 data URI; images are not fetched from addresses")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise RequestError(f"an image's data URI is no base64: {error}") from None
