"""What one engine alone knows: values that requests carry by name, without a field of their own on the wire.

A model announces the keys that it knows, and a request with another is refused by name. Some keys mean the same wherever they
are known; of these the types are checked here, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from zfabric.errors import RequestError, TooLargeError
from zfabric.limits import EXTRA_KEYS_MAX, NAME_LENGTH_MAX, TOKEN_ID_MAX

#: Keys that have one meaning on all backends, and their types. `cache_salt` keeps the cache of a prompt to requests of the same
#: salt; `kv_transfer_params` is for the engine's connector of caches; `extra_args` goes to plug-ins of the engine; `include_stop`
#: leaves the stop string in the text; `detokenize=False` makes tokens and no text; `allowed_token_ids` are all that may be drawn;
#: `forced_bos_token_id` begins the answer of a model with an encoder, as the language of a translation;
#: `language` is what is spoken in a sound, by name or code, and `task` whether it is written down or translated into English.
COMMON: Final[dict[str, Any]] = {
    # Engines put it into names of files and of other machines' caches.
    "cache_salt": Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\0]*$")],
    "kv_transfer_params": dict[str, Any],
    "extra_args": dict[str, Any],
    "include_stop": bool,
    "detokenize": bool,
    "language": Annotated[str, Meta(min_length=1, max_length=64)],
    "task": Literal["transcribe", "translate"],
    "forced_bos_token_id": Annotated[int, Meta(ge=0, le=TOKEN_ID_MAX)],
    "allowed_token_ids": Annotated[list[Annotated[int, Meta(ge=0, le=TOKEN_ID_MAX)]], Meta(min_length=1)],
}


def check_extra(extra: Mapping[str, Any], types: Mapping[str, Any] = COMMON) -> None:
    """Check keys and values of a request's `extra`; of keys that are not in `types` any value will do.

    Args:
        types: As msgspec reads annotations.

    Raises:
        TooLargeError: There are too many.
        RequestError: A key that is no name, or a value of another type.
    """
    if len(extra) > EXTRA_KEYS_MAX:
        raise TooLargeError(
            f"extra has {len(extra)} keys, limit is {EXTRA_KEYS_MAX}", parameter="extra", limit=EXTRA_KEYS_MAX
        )
    for name, value in extra.items():
        if not 1 <= len(name) <= NAME_LENGTH_MAX:
            raise RequestError(
                f"a key of extra has {len(name)} characters, it must have 1 … {NAME_LENGTH_MAX}", parameter="extra"
            )
        if name not in types:
            continue
        try:
            msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            fact = str(error)
            raise RequestError(f"extra {name!r}: {fact[:1].lower()}{fact[1:]}", parameter=name) from None


def merged(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """What two parts of an answer say besides: of the same key, the later part's."""
    return {**first, **second} if first and second else first or second
