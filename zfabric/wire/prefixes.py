"""Hashes of a prompt's first blocks, by which a controller finds who has them cached.

A block's hash covers the block and the hash before it, so equal ones mean equal prompts up to there. It is BLAKE2b of 8 bytes
with a personalisation that tells tokens from text, over the hash before (8 zero bytes at first) and the block:

- of tokens, blocks of 16, each token as 4 bytes, little endian;
- of text, blocks of 64 characters (code points) in UTF-8: a client needs no tokenizer for it. Messages are hashed as the text
  that `rendered` makes of them, which grows at its end as a conversation does.

Only full blocks are hashed, and `PREFIX_BLOCKS_MAX` of them at most. Eight bytes are short enough that whoever tries can make two
prompts with one hash; what that does is to send a request where its prompt is not cached, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from struct import pack
from typing import Any

import msgspec

from zfabric.limits import (
    PREFIX_BLOCK_CHARACTERS,
    PREFIX_BLOCK_TOKENS,
    PREFIX_BLOCKS_MAX,
    PREFIX_HASH_BYTES,
)
from zfabric.wire.chat import Message
from zfabric.wire.payloads import TextRequest

_FIRST = bytes(PREFIX_HASH_BYTES)
_TOKENS, _TEXT = b"zfabric.tokens", b"zfabric.text"
_CHARACTERS_MAX = PREFIX_BLOCKS_MAX * PREFIX_BLOCK_CHARACTERS
_json = msgspec.json.Encoder(order="sorted")


def token_hashes(token_ids: Sequence[int], before: bytes = _FIRST) -> bytes:
    """The hashes of token ids, each 0 … 2³² - 1, one after the other.

    Args:
        token_ids: What is to be hashed; tokens that fill no block are left out.
        before: The hash of the block before the first one, if that is not the prompt's first.
    """
    count = min(len(token_ids) // PREFIX_BLOCK_TOKENS, PREFIX_BLOCKS_MAX)
    packed = pack(f"<{count * PREFIX_BLOCK_TOKENS}I", *token_ids[: count * PREFIX_BLOCK_TOKENS])
    size = 4 * PREFIX_BLOCK_TOKENS
    return _chained((packed[start : start + size] for start in range(0, len(packed), size)), _TOKENS, before)


def text_hashes(text: str) -> bytes:
    """The hashes of a text, one after the other."""
    size = PREFIX_BLOCK_CHARACTERS
    end = min(len(text), _CHARACTERS_MAX) // size * size
    blocks = (text[start : start + size].encode("utf-8", "surrogatepass") for start in range(0, end, size))
    return _chained(blocks, _TEXT, _FIRST)


def prefix_hashes(request: TextRequest) -> bytes:
    """The hashes of a request's prompt, of whichever kind it is."""
    if request.prompt_token_ids is not None:
        return token_hashes(request.prompt_token_ids)
    if request.prompt is not None:
        return text_hashes(request.prompt)
    return text_hashes(rendered(request.messages or [], request.tools))


def rendered(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> str:
    """A chat as one text: the tools and then each message as JSON, keys in order, up to as much as is hashed."""
    parts = [_json.encode(tools).decode() if tools else ""]
    size = len(parts[0])
    for message in messages:
        if size >= _CHARACTERS_MAX:
            break
        parts.append(_json.encode(message).decode())
        size += len(parts[-1])
    return "".join(parts)


def _chained(blocks: Iterator[bytes], person: bytes, before: bytes) -> bytes:
    hashes = []
    for block in blocks:
        before = blake2b(before + block, digest_size=PREFIX_HASH_BYTES, person=person).digest()
        hashes.append(before)
    return b"".join(hashes)
