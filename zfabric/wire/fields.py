"""What fields of messages may hold: types with their bounds, which are checked while decoding, in the same pass."""

from __future__ import annotations

import sys
from typing import Annotated, Final, Literal

from msgspec import Meta, Raw

from zfabric.limits import (
    AFFINITY_LENGTH_MAX,
    ATTEMPTS_MAX,
    LOCK_BYTES,
    NAME_LENGTH_MAX,
    PREFIX_BLOCKS_MAX,
    PREFIX_HASH_BYTES,
    TRACEPARENT_LENGTH_MAX,
    TRACESTATE_LENGTH_MAX,
)

Name = Annotated[str, Meta(min_length=1, max_length=NAME_LENGTH_MAX)]
OptionalName = Annotated[str, Meta(max_length=NAME_LENGTH_MAX)]
Unsigned32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Unsigned63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Attempt = Annotated[int, Meta(ge=0, le=ATTEMPTS_MAX)]
#: What can be compared, added up and shown: no infinity, and not the value that is no number.
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Operation = Literal[
    "generate", "embed", "embed_tokens", "count_tokens", "tokenize", "detokenize", "score", "classify", "reward", "operate"
]  # fmt: skip
#: What a model or an operator is told beside what has a name.
FiniteDetail = str | int | Finite | bool | None
#: What a client's secret hashes to (`zfabric.wire.locks`): whoever claims a request has to show the secret.
Lock = Annotated[bytes, Meta(max_length=LOCK_BYTES)]
#: W3C trace context (`zfabric.wire.traces`). What is no such thing is ignored by whoever would use it.
Traceparent = Annotated[str, Meta(max_length=TRACEPARENT_LENGTH_MAX)]
Tracestate = Annotated[str, Meta(max_length=TRACESTATE_LENGTH_MAX)]
#: What requests have in common that are to run at the same worker.
Affinity = Annotated[str, Meta(max_length=AFFINITY_LENGTH_MAX)]
#: Hashes of a prompt's blocks, one after the other.
Prefix = Annotated[bytes, Meta(max_length=PREFIX_BLOCKS_MAX * PREFIX_HASH_BYTES)]

#: An encoded nil: no result.
NIL: Final = Raw(b"\xc0")
