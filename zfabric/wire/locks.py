"""How a client proves, to a controller that never saw it, that a running stream is its own.

A client draws a secret and shows it in each HELLO. The controller hands its hash, the lock, to the worker with each
request, and the worker gives the lock back when it announces what it carries. Whoever knows a request's numbers, or has
seen a lock, cannot claim it. A client without a secret has the empty lock: its streams are as safe as their numbers.
"""

from __future__ import annotations

import hashlib

from zfabric.limits import LOCK_BYTES


def lock_of(secret: bytes) -> bytes:
    """The lock that a secret opens; no secret, no lock."""
    return hashlib.sha256(secret).digest()[:LOCK_BYTES] if secret else b""
