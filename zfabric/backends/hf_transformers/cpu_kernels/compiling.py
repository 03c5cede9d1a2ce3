"""How functions of this package are compiled, and where what was compiled is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

from zfabric.directories import cache_directory


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function for the types that it is called with, once for all processes of this user.

    It holds no lock of the interpreter while it runs, and checks nothing.
    """
    # Numba looks only at a function's own file for whether it has changed, and beside it for what it kept.
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_kept())
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(nogil=True, error_model="numpy", boundscheck=False)(function)
    finally:
        numba.config.CACHE_DIR = before


def inlined(function: Callable[..., Any]) -> Any:
    """Part of what calls it, once that is compiled."""
    return numba.njit(inline="always", error_model="numpy", boundscheck=False)(function)


@cache
def _kept() -> Path:
    """A folder for this very code."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    return cache_directory() / "kernels" / f"{numba.__version__}-{digest}"
