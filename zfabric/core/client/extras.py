"""What few chunks have beside text and tokens, as far as it is their request's business."""

from __future__ import annotations

from typing import Final

from zfabric.core.client.pending import Pending, Trace
from zfabric.errors import ProtocolError
from zfabric.wire.answers import ChunkExtra

#: Offsets are 32 bits wide.
_UNITS_MAX: Final = 2**32 - 1


def units_of(pending: Pending, index: int, token_ids: list[int], extra: ChunkExtra) -> int:
    """How far a chunk with rare parts goes; notes what they say of its attempt. Raises: ProtocolError."""
    if extra.worker is not None:
        pending.exact, pending.host = extra.exact, extra.worker
    if pending.trace is not None:
        _tell(pending.trace, index, extra)
    if extra.reasoning or extra.tool_calls:
        pending.characters += extra.characters
    if extra.units is None:
        return len(token_ids) or 1
    if not 0 < extra.units <= _UNITS_MAX - pending.next:
        raise ProtocolError(f"a chunk says that it has {extra.units} units", units=extra.units)
    return extra.units


def _tell(trace: Trace, index: int, extra: ChunkExtra) -> None:
    """What few chunks have, as far as it is a trace's business."""
    if extra.worker is not None:
        trace.began(extra.worker)
    if extra.finish_reason is not None:
        trace.choice_ended(index, extra.finish_reason)
