"""Where things of a user are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """$ZFABRIC_CACHE, else the user's cache directory."""
    given = os.environ.get("ZFABRIC_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zfabric"
