"""What the controller reads: envelopes of passing messages, and the bodies of control messages.

All are MessagePack arrays in field order; a receiver ignores fields it does not know at the end, so that a later minor
version can add some. Bounds on strings and lists are checked while decoding, in the same pass. Structs of more than one
field are built by keyword: their order is the wire's business.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Raw, Struct

from zfabric.errors import Detail
from zfabric.limits import (
    ATTEMPTS_MAX,
    DEADLINE_MAX_MS,
    GAUGES_MAX,
    LIST_LENGTH_MAX,
    LOCK_BYTES,
    NAME_LENGTH_MAX,
    PRIORITY_MAX,
    SLOTS_MAX,
    SPEED_MAX,
    WORKER_MODELS_MAX,
)

Name = Annotated[str, Meta(min_length=1, max_length=NAME_LENGTH_MAX)]
OptionalName = Annotated[str, Meta(max_length=NAME_LENGTH_MAX)]
Unsigned32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Unsigned63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Attempt = Annotated[int, Meta(ge=0, le=ATTEMPTS_MAX)]
#: What can be compared, added up and shown: no infinity, and not the value that is no number.
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Operation = Literal["generate", "embed", "count_tokens", "operate"]
#: What a model or an operator is told beside what has a name.
FiniteDetail = str | int | Finite | bool | None
#: What a client's secret hashes to (`zfabric.wire.locks`): whoever claims a request has to show the secret.
Lock = Annotated[bytes, Meta(max_length=LOCK_BYTES)]

#: An encoded nil: no result.
NIL: Final = Raw(b"\xc0")

# ── Envelopes: header = kind byte + one of these ────────────────────────────────────────────────────────────────────


class Submit(Struct, array_like=True, kw_only=True, gc=False):
    """client → controller. The body is the request, for the worker only.

    Attributes:
        request: Random name of the request, unique among the client's own.
        attempt: 0, then one more at each resubmission; answers to older attempts are ignored.
        operation: What is asked.
        model: Model or alias; "" where `worker` is given for an operator's call.
        priority: Of the requests that wait, those with the lowest number are served first; 0 is usual.
        deadline_ms: Time left from now, None for no deadline.
        window: Units the worker may send before it needs credit, counted from the answer's start.
        resume_from: Units the client already has (0 for a fresh request).
        worker: Only this worker will do; "" for any.
    """

    request: Unsigned63
    attempt: Attempt
    operation: Operation
    model: OptionalName
    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = 0
    deadline_ms: Annotated[int, Meta(ge=0, le=DEADLINE_MAX_MS)] | None = None
    window: Unsigned32 = 0
    resume_from: Unsigned32 = 0
    worker: OptionalName = ""


class Dispatch(Struct, array_like=True, kw_only=True, gc=False):
    """controller → worker. As Submit, with whose it is: the session's number, and the client's instance and lock."""

    client: Unsigned32
    instance: Unsigned63
    request: Unsigned63
    attempt: Attempt
    operation: Operation
    model: OptionalName
    priority: int = 0
    deadline_ms: int | None = None
    window: Unsigned32 = 0
    resume_from: Unsigned32 = 0
    lock: Lock = b""


class End(Struct, array_like=True, kw_only=True, gc=False):
    """One terminal: code 0 for done, else an error's code."""

    request: Unsigned63
    attempt: Attempt
    code: Annotated[int, Meta(ge=0, le=99_999)] = 0


class Ends(Struct, array_like=True, kw_only=True, gc=False):
    """worker → controller → client: the terminals in a step of one client, named by its instance.

    Attributes:
        client: The session's number that chunks of these streams carry. Terminals that were on their way when the client
            came back under another number are kept until it has claimed them. 0 for whatever number it has now.
    """

    instance: Unsigned63
    ends: Annotated[list[End], Meta(max_length=LIST_LENGTH_MAX)]
    client: Unsigned32 = 0


# ── Control bodies ──────────────────────────────────────────────────────────────────────────────────────────────────


class Claim(Struct, array_like=True, kw_only=True, gc=False):
    """A request that a returning client still waits for; it has every unit before `next`."""

    request: Unsigned63
    attempt: Attempt
    next: Unsigned32
    window: Unsigned32
    model: OptionalName = ""


class ClientHello(Struct, array_like=True, kw_only=True):
    """client → controller, first of all, and again after each reconnect.

    Attributes:
        token: Of the last WELCOME, empty at first: proves to the same controller that this is the same client.
        claims: What it still waits for; those that do not fit follow in CLAIMS.
        label: Shown to operators.
        secret: Random bytes of this client. Its hash goes with each request to the worker, so that after a controller's
            death only who knows the secret can take a stream over.
    """

    version: int
    build: OptionalName
    instance: Unsigned63
    token: Annotated[bytes, Meta(max_length=64)] = b""
    claims: Annotated[list[Claim], Meta(max_length=LIST_LENGTH_MAX)] = []
    label: OptionalName = ""
    secret: Annotated[bytes, Meta(max_length=64)] = b""


class Claims(Struct, array_like=True, gc=False):
    """client → controller: more claims, after WELCOME or whenever a worker was lost that may come back."""

    claims: Annotated[list[Claim], Meta(max_length=LIST_LENGTH_MAX)]


class ModelInfo(Struct, array_like=True, kw_only=True):
    """What a worker tells of a model it serves.

    Attributes:
        name: The name clients use.
        aliases: Other names for it.
        context_length: Tokens of prompt and answer together; 0 if unknown.
        capabilities: Of "generate", "embed", "count_tokens", "chat" (messages are understood), "multimodal" (images in
            messages), and "resume" (goes on exactly from prompt + tokens so far).
        parameters: Sampling parameters that are honoured.
        defaults: The model's own values of parameters, which hold where a request leaves them unset.
        dimensions: Length of an embedding; 0 if it makes none.
        slots: Concurrent requests of this model, 0 for as many as the worker has.
        engine: Which of the worker's engines serves it: an index of `Load.engines`.
        details: What else an operator wants to see: engine, dtype, device, quantization, ….
    """

    name: Name
    aliases: Annotated[list[Name], Meta(max_length=64)] = []
    context_length: Annotated[int, Meta(ge=0)] = 0
    capabilities: Annotated[list[Name], Meta(max_length=32)] = []
    parameters: Annotated[list[Name], Meta(max_length=64)] = []
    dimensions: Annotated[int, Meta(ge=0)] = 0
    slots: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] = 0
    details: dict[str, FiniteDetail] = {}
    engine: Annotated[int, Meta(ge=0, lt=WORKER_MODELS_MAX)] = 0
    defaults: Annotated[dict[Name, int | Finite], Meta(max_length=32)] = {}


class Load(Struct, array_like=True, kw_only=True, gc=False):
    """worker → controller at every beat, and whenever slots or state change.

    Attributes:
        running, waiting: Requests in the engine's batch, and those it holds back.
        slots: Concurrent requests the worker takes now.
        progress: Sum of what `engines` says, for operators.
        tokens_per_second: Drawn in the last beat interval.
        dispatches: Dispatches of this session seen so far: what the figures above already include.
        kv_blocks_free: Free cache blocks, None where the engine tells none.
        draining: Finishes what it has and takes nothing new.
        gauges: Whatever else the engine tells (cache use, prefix hits …).
        engines: One counter for each engine of the worker, which moves only when that engine does; one that has work and
            does not move has hung. None where an engine does not tell: such a one is never taken for hung.
    """

    running: Unsigned32 = 0
    waiting: Unsigned32 = 0
    slots: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] = 0
    progress: Unsigned63 = 0
    tokens_per_second: Finite = 0.0
    dispatches: Unsigned63 = 0
    kv_blocks_free: int | None = None
    draining: bool = False
    gauges: Annotated[dict[Name, Finite], Meta(max_length=GAUGES_MAX)] = {}
    engines: Annotated[list[Unsigned63 | None], Meta(max_length=WORKER_MODELS_MAX)] = []


class Carried(Struct, array_like=True, kw_only=True, gc=False):
    """A request that a returning worker still has; `finished` ones wait only for their reader."""

    instance: Unsigned63
    request: Unsigned63
    attempt: Attempt
    operation: Operation
    model: OptionalName
    finished: bool = False
    lock: Lock = b""


class CarriedMore(Struct, array_like=True, gc=False):
    """worker → controller: more carried requests, after WELCOME."""

    carried: Annotated[list[Carried], Meta(max_length=LIST_LENGTH_MAX)]


class WorkerHello(Struct, array_like=True, kw_only=True):
    """worker → controller, first of all, again after each reconnect, and when its models change.

    Attributes:
        name: The worker's name; one live worker holds it.
        instance: Random number of this run of the worker (its incarnation).
        models: All that it serves now, each name once; none is an announcement as well.
        token: Of the last WELCOME: proves that a second HELLO under the name is the same worker.
        speed: Relative speed, the weight of `lottery` and the divisor of `shortest_queue`.
        beats: False for a static worker, which is never removed for silence.
        carried: What it runs, or has finished and not delivered; those that do not fit follow in CARRIED.
    """

    version: int
    build: OptionalName
    name: Name
    instance: Unsigned63
    models: Annotated[list[ModelInfo], Meta(max_length=WORKER_MODELS_MAX)]
    load: Load
    speed: Annotated[float, Meta(ge=0, le=SPEED_MAX)] = 1.0
    beats: bool = True
    token: Annotated[bytes, Meta(max_length=64)] = b""
    carried: Annotated[list[Carried], Meta(max_length=LIST_LENGTH_MAX)] = []


class Welcome(Struct, array_like=True, kw_only=True):
    """controller → peer: the session stands. `epoch` is the controller's own random number; it changes at a restart."""

    version: int
    build: str
    epoch: int
    session: Unsigned32
    token: bytes
    beat_ms: int
    lease_ms: int
    frame_bytes_max: int


class Beat(Struct, array_like=True, gc=False):
    """Either way: I am here. Answered with the same number by the controller."""

    number: Unsigned63 = 0


class Cancel(Struct, array_like=True, gc=False):
    """client → controller: these requests are no longer wanted."""

    requests: Annotated[list[Unsigned63], Meta(max_length=LIST_LENGTH_MAX)]


class CreditLine(Struct, array_like=True, kw_only=True, gc=False):
    """The reader consumed so much that units below `window` may be sent; it has all before `next`.

    With `again`, which only a controller sets, the way between was new: send from `next` on.
    """

    request: Unsigned63
    attempt: Attempt
    next: Unsigned32
    window: Unsigned32
    again: bool = False


class Credit(Struct, array_like=True, gc=False):
    """client → controller."""

    lines: Annotated[list[CreditLine], Meta(max_length=LIST_LENGTH_MAX)]


class Grant(Struct, array_like=True, kw_only=True, gc=False):
    """controller → worker: credit of one client, under the number that its chunks are to carry."""

    client: Unsigned32
    instance: Unsigned63
    lines: list[CreditLine]


class Abort(Struct, array_like=True, kw_only=True, gc=False):
    """controller → worker: stop these attempts, (request, attempt), of one client. Each still gets its terminal."""

    instance: Unsigned63
    attempts: list[tuple[Unsigned63, Attempt]]


class Drain(Struct, array_like=True, gc=False):
    """controller → worker: an operator wants it to finish and leave."""

    limit_ms: Unsigned32


class Goodbye(Struct, array_like=True, gc=False):
    """Either way: this session ends on purpose."""

    reason: OptionalName = ""


class Query(Struct, array_like=True, kw_only=True):
    """client → controller: a question about the fabric."""

    number: Unsigned63
    what: Name
    arguments: Annotated[dict[Name, Any], Meta(max_length=32)] = {}


class Answer(Struct, array_like=True, kw_only=True):
    """controller → client: what was asked, or an error. A long list comes as several answers; all but the last set `more`."""

    number: int
    code: int
    message: str = ""
    details: dict[str, Detail] = {}
    result: Raw = NIL
    more: bool = False


class Fault(Struct, array_like=True, kw_only=True):
    """controller → peer: your message could not be used. In REFUSED it means: and there is no session for you.

    A fault names what it answers where that could be read, and ends it: an attempt of a request, or a query.
    """

    code: int
    message: str
    details: dict[str, Detail] = {}
    request: Unsigned63 | None = None
    attempt: Attempt | None = None
    query: Unsigned63 | None = None
