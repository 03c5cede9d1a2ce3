"""The date that answers of HTTP APIs carry, for people: the only look at the wall clock, on which nothing depends."""

from __future__ import annotations

import time


def created() -> int:
    """Seconds since 1970, as OpenAI's API has them in `created`."""
    return int(time.time())
