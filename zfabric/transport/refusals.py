"""Why a controller refuses a peer, or a peer a controller, in the words that both drivers have for it."""

from __future__ import annotations

from typing import Final

from zfabric.errors import AuthenticationError, FabricError, IncorrectKeyError

#: The error's class, and what the controller does.
Refusal = tuple[type[FabricError], str]

UNKNOWN_KEY: Final[Refusal] = (IncorrectKeyError, "does not know this key")
OTHER_KEY: Final[Refusal] = (IncorrectKeyError, "has another key than the one that this side was given for it")
NO_KEYS_THERE: Final[Refusal] = (
    AuthenticationError,
    "has no keys and does not encrypt; this side has a key and demands it",
)
NO_KEYS_HERE: Final[Refusal] = (AuthenticationError, "demands a key, and this side has none")


def refused(refusal: Refusal, endpoint: str) -> FabricError:
    """The error, for whoever asked for this endpoint."""
    kind, why = refusal
    return kind(f"the controller at {endpoint} {why}", endpoint=endpoint)
