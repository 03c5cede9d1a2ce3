"""How a client proves, to a controller that never saw it, that a running stream is its own.

A client draws a secret and shows it in each HELLO. Its hash is the client's lock, which stays with the controller. What the lock
and a request's number hash to is the request's lock: the controller hands it to the worker with the request, and the worker
gives it back when it announces what it carries. Whoever knows a request's numbers, or has seen locks, cannot claim it, nor
make the lock of another request, and so bring another worker's back. A client without a secret has the empty lock: its
streams are as safe as their numbers.
"""

from __future__ import annotations

import hashlib

from zfabric.limits import LOCK_BYTES


def lock_of(secret: bytes) -> bytes:
    """The lock of a client that a secret opens; no secret, no lock."""
    return hashlib.sha256(secret).digest()[:LOCK_BYTES] if secret else b""


def lock_of_request(lock: bytes, request: int) -> bytes:
    """The lock of a client's request; none where the client has none."""
    return hashlib.sha256(lock + request.to_bytes(8, "big")).digest()[:LOCK_BYTES] if lock else b""
