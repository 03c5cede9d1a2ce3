"""Images in chat messages: taken from the request itself, never fetched from anywhere."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

from zfabric.backends.front.chat import chat_text, is_image, parts_of
from zfabric.errors import RequestError, TooLargeError, UnsupportedOperationError
from zfabric.limits import IMAGE_PIXELS_MAX, IMAGES_MAX
from zfabric.wire.chat import ChatOptions, Message


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
    parts = [part for message in messages for part in parts_of(message) if is_image(part)]
    if len(parts) > IMAGES_MAX:
        raise TooLargeError(f"the messages have {len(parts)} images, {IMAGES_MAX} are allowed", images=len(parts))
    images = _decoded_all([_open(part) for part in parts])
    image = str(getattr(processor, "image_token", None) or "<image>")
    text = chat_text(tokenizer, messages, tools, chat=chat, image=image)
    try:
        made = dict(processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))
    except (ValueError, TypeError, OSError) as error:
        raise RequestError(f"the model's processor refuses these images: {error}") from None
    tokens: list[int] = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    return tokens, made


def _open(part: dict[str, Any]) -> Any:
    """The image of a part: {"type": "image", "image": …} or {"type": "image_url", "image_url": {"url": …}}."""
    from PIL import Image

    value = part.get("image", part.get("image_url"))
    if isinstance(value, dict):
        value = value.get("url")
    data = _decoded(value) if isinstance(value, str) else value
    if not isinstance(data, bytes):
        raise RequestError(f"an image is {type(value).__name__}, it must be bytes or a data URI")
    try:
        # What is there, and how large: nothing is decoded yet.
        return Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"an image cannot be read: {error}") from None


def _decoded_all(images: Sequence[Any]) -> list[Any]:
    """The images of one request, if all of them together are not too large."""
    from PIL import Image

    pixels = sum(image.width * image.height for image in images)
    if pixels > IMAGE_PIXELS_MAX:
        raise TooLargeError(f"the images have {pixels} pixels, {IMAGE_PIXELS_MAX} are allowed", pixels=pixels)
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
