"""What the controller reads: envelopes of passing messages, and the bodies of control messages.

All are MessagePack arrays in field order; a receiver ignores fields it does not know at the end, so that a later minor
version can add some. Bounds on strings and lists are checked while decoding, in the same pass.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from zfabric import limits
from zfabric.wire.fields import (
    Affinity,
    Attempt,
    Finite,
    FiniteDetail,
    Lock,
    Name,
    Operation,
    OptionalName,
    Prefix,
    Traceparent,
    Tracestate,
    Unsigned32,
    Unsigned63,
)
from zfabric.wire.load import Load

# ── Envelopes: header = kind byte + one of these ────────────────────────────────────────────────────────────────────


class Submit(Struct, array_like=True, kw_only=True, gc=False):
    """client → controller. The body is the request, for the worker only.

    Attributes:
        request: Random number of the request, unique among the client's own.
        attempt: 0, then one more at each resubmission; answers to older attempts are ignored.
        operation: What is asked.
        model: Model or alias; "" where `worker` is given for an operator's call.
        priority: Of the requests that wait, those with the lowest number are served first; 0 is usual.
        deadline_ms: Time left from now, None for no deadline.
        window: Units of the answer that may be sent before credit comes; 0 holds everything back until the terminal.
        resume_from: Units the client already has, 0 for a fresh request: the attempt's first chunk has this offset.
        worker: Only this worker will do, which needs an operator's key; "" for any.
        traceparent: W3C trace context: the span that this request belongs below; "" for none. What is malformed is ignored.
        tracestate: What goes with it; "" for nothing.
        affinity: A key: a policy may send requests of one key to one worker; "" for none. Since version 2.2.
        prefix: Hashes of the prompt's first blocks, 8 bytes each, each of its block and all before it. Since version 2.2.
        prefix_block: Tokens of each block, or what a block of text is taken for; 0 without hashes. Since version 2.2.
    """

    request: Unsigned63
    attempt: Attempt
    operation: Operation
    model: OptionalName
    priority: Annotated[int, Meta(ge=-limits.PRIORITY_MAX, le=limits.PRIORITY_MAX)] = 0
    deadline_ms: Annotated[int, Meta(ge=0, le=limits.DEADLINE_MAX_MS)] | None = None
    window: Unsigned32 = 0
    resume_from: Unsigned32 = 0
    worker: OptionalName = ""
    traceparent: Traceparent = ""
    tracestate: Tracestate = ""
    affinity: Affinity = ""
    prefix: Prefix = b""
    prefix_block: Unsigned32 = 0


class Dispatch(Struct, array_like=True, kw_only=True, gc=False):
    """controller → worker. As Submit, with whose it is: the session's number, and the client's instance and lock.

    Attributes:
        client: Number of the client's session, which the chunks for it begin with.
        instance: The client's, which the terminals for it name.
        request: As in the SUBMIT.
        attempt: As in the SUBMIT.
        operation: As in the SUBMIT.
        model: The model's own name, also where the SUBMIT has an alias; "" for the worker's first.
        priority: As in the SUBMIT.
        deadline_ms: What is left of it now, in milliseconds; None for no deadline.
        window: As in the SUBMIT, or what credit has made of it since.
        resume_from: As in the SUBMIT.
        lock: What the client's secret hashes to; `Carried` tells it again.
        traceparent: As in the SUBMIT; or the controller's own span of this attempt, where it makes any.
        tracestate: As in the SUBMIT.
        affinity: As in the SUBMIT, to a worker that is a cell. Since version 2.4, as the others below.
        prefix: As in the SUBMIT, to a cell.
        prefix_block: As in the SUBMIT, to a cell.
        worker: Only this worker of the cell will do: what follows the cell's name and a slash in the SUBMIT; "" for any.
    """

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
    traceparent: Traceparent = ""
    tracestate: Tracestate = ""
    affinity: Affinity = ""
    prefix: Prefix = b""
    prefix_block: Unsigned32 = 0
    worker: OptionalName = ""


class End(Struct, array_like=True, kw_only=True, gc=False):
    """One terminal.

    Attributes:
        request: What has ended.
        attempt: Which attempt of it.
        code: 0 for done, else an error's code.
        units: Where the answer ends, in units, by which tokens of a key are counted; 0 for unsaid. Since version 2.1.
    """

    request: Unsigned63
    attempt: Attempt
    code: Annotated[int, Meta(ge=0, le=99_999)] = 0
    units: Unsigned32 = 0


class Ends(Struct, array_like=True, kw_only=True, gc=False):
    """worker → controller → client: the terminals in a step of one client, named by its instance.

    Attributes:
        instance: The client's.
        ends: What has ended.
        client: The session's number that chunks of these streams carry. Terminals that were on their way when the client
            came back under another number are kept until it has claimed them. 0 for whatever number it has now.
    """

    instance: Unsigned63
    ends: Annotated[list[End], Meta(max_length=limits.LIST_LENGTH_MAX)]
    client: Unsigned32 = 0


# ── Control bodies ──────────────────────────────────────────────────────────────────────────────────────────────────


class Claim(Struct, array_like=True, kw_only=True, gc=False):
    """A request that a returning client still waits for.

    Attributes:
        request: What it waits for.
        attempt: Which attempt of it.
        next: The first unit that it lacks.
        window: Units that may be sent, counted from the answer's start.
        model: As in the SUBMIT.
        affinity: As in the SUBMIT, so that a new controller knows where requests of the key run. Since version 2.2.
        moved: Whether the client may have come from another controller, so that the request may run at a worker that has not
            said so here. Since version 2.4.
        worker: Where it runs, as far as its chunks have told; "" where none has come. Since version 2.4.
    """

    request: Unsigned63
    attempt: Attempt
    next: Unsigned32
    window: Unsigned32
    model: OptionalName = ""
    affinity: Affinity = ""
    moved: bool = False
    worker: OptionalName = ""


class ClientHello(Struct, array_like=True, kw_only=True):
    """client → controller, first of all, and again after each reconnect.

    Attributes:
        version: Of the protocol.
        build: Of the program, for messages.
        instance: Random number of this client, the same on each of its connections.
        token: Of the last WELCOME, empty at first: proves to the same controller that this is the same client.
        claims: What it still waits for; those that do not fit follow in CLAIMS.
        label: Shown to operators.
        secret: Random bytes of this client. Its hash goes with each request to the worker, so that after a controller's
            death only who knows the secret can take a stream over.
        minor: The minor version of the protocol that the client speaks; 0 for version 2.0, which has no such field.
    """

    version: int
    build: OptionalName
    instance: Unsigned63
    token: Annotated[bytes, Meta(max_length=64)] = b""
    claims: Annotated[list[Claim], Meta(max_length=limits.LIST_LENGTH_MAX)] = []
    label: OptionalName = ""
    secret: Annotated[bytes, Meta(max_length=64)] = b""
    minor: Unsigned32 = 0


class Claims(Struct, array_like=True, gc=False):
    """client → controller: more claims, after WELCOME or whenever a worker was lost that may come back.

    Attributes:
        claims: What the client still waits for.
    """

    claims: Annotated[list[Claim], Meta(max_length=limits.LIST_LENGTH_MAX)]


class ModelInfo(Struct, array_like=True, kw_only=True):
    """What a worker tells of a model it serves.

    Attributes:
        name: The name clients use.
        aliases: Other names for it.
        context_length: Tokens of prompt and answer together; 0 if unknown.
        capabilities: Of "generate", "embed", "embed_tokens", "count_tokens", "tokenize", "detokenize", "score", "classify",
            "reward", "chat" (messages), "multimodal" (images in them), and "resume" (goes on exactly from prompt and tokens).
        parameters: Those honoured: of the sampling; of a chat "tools", "response_format", "chat_template_kwargs", "documents",
            "add_generation_prompt", "continue_final_message". None, not known: none is refused. Empty: `max_new_tokens` alone.
        defaults: The model's own values of parameters, which hold where a request leaves them unset.
        dimensions: Length of an embedding; 0 if it makes none.
        slots: Concurrent requests of this model, 0 for as many as the worker has.
        engine: Which of the worker's engines serves it: an index of `Load.engines`.
        details: What else an operator wants to see: engine, dtype, device, quantization, ….
        extra: Keys that a request's `extra` may have; None where any will do.
        loadable: Names of its adapters that the worker loads when it is asked for one, loaded or not. Since version 2.2.
    """

    name: Name
    aliases: Annotated[list[Name], Meta(max_length=64)] = []
    context_length: Annotated[int, Meta(ge=0)] = 0
    capabilities: Annotated[list[Name], Meta(max_length=32)] = []
    parameters: Annotated[list[Name], Meta(max_length=64)] | None = None
    dimensions: Annotated[int, Meta(ge=0)] = 0
    slots: Annotated[int, Meta(ge=0, le=limits.SLOTS_MAX)] = 0
    details: dict[str, FiniteDetail] = {}
    engine: Annotated[int, Meta(ge=0, lt=limits.WORKER_MODELS_MAX)] = 0
    defaults: Annotated[dict[Name, int | Finite], Meta(max_length=32)] = {}
    extra: Annotated[list[Name], Meta(max_length=64)] | None = []
    loadable: Annotated[list[Name], Meta(max_length=limits.WORKER_MODELS_MAX)] = []


class Carried(Struct, array_like=True, kw_only=True, gc=False):
    """A request that a returning worker still has.

    Attributes:
        instance: Of its client, from the DISPATCH, as all but `finished`.
        request: Its number.
        attempt: Which attempt of it.
        operation: What was asked.
        model: The model's own name.
        finished: Whether it waits only for its reader, and needs no slot.
        lock: What the client's secret hashes to.
    """

    instance: Unsigned63
    request: Unsigned63
    attempt: Attempt
    operation: Operation
    model: OptionalName
    finished: bool = False
    lock: Lock = b""


class CarriedMore(Struct, array_like=True, gc=False):
    """worker → controller: more carried requests, after WELCOME.

    Attributes:
        carried: What did not fit the HELLO.
    """

    carried: Annotated[list[Carried], Meta(max_length=limits.LIST_LENGTH_MAX)]


class Locate(Struct, array_like=True, kw_only=True, gc=False):
    """controller → worker: which of these attempts of one client does it have, of whichever controller? Since version 2.4.

    Attributes:
        number: Comes back in LOCATED.
        instance: The client's.
        attempts: Pairs of request and attempt.
    """

    number: Unsigned32
    instance: Unsigned63
    attempts: Annotated[list[tuple[Unsigned63, Attempt]], Meta(max_length=limits.LIST_LENGTH_MAX)]


class Located(Struct, array_like=True, kw_only=True, gc=False):
    """worker → controller: those that it has; the others it has not. Since version 2.4.

    Attributes:
        number: Of the LOCATE.
        carried: What it has of what was asked for. It goes on as it did until a GRANT says that its reader is here now.
        more: Whether another LOCATED of this number follows.
    """

    number: Unsigned32
    carried: Annotated[list[Carried], Meta(max_length=limits.LIST_LENGTH_MAX)]
    more: bool = False


class WorkerHello(Struct, array_like=True, kw_only=True):
    """worker → controller, first of all, again after each reconnect, and when its models change.

    Attributes:
        version: Of the protocol.
        build: Of the program, for messages.
        name: The worker's name; one live worker holds it.
        instance: Random number of this run of the worker (its incarnation).
        models: All that it serves now, each name once; none is an announcement as well.
        load: How it is now.
        token: Of the last WELCOME: proves that a second HELLO under the name is the same worker.
        speed: Relative speed, the weight of `lottery` and the divisor of `shortest_queue`.
        beats: False for a static worker, which is never removed for silence.
        carried: What it runs, or has finished and not delivered; those that do not fit follow in CARRIED.
        minor: The minor version of the protocol that the worker speaks; 0 for version 2.0, which has no such field.
        cells: Of a worker that is a cell, the `epoch` of its controller and those of all cells below it; a controller that finds
            its own among them refuses the cell with 40011. Empty for any other worker. Since version 2.4.
        depth: How many controllers a request may pass in the cell; 0 for a worker that is none. Since version 2.4.
    """

    version: int
    build: OptionalName
    name: Name
    instance: Unsigned63
    models: Annotated[list[ModelInfo], Meta(max_length=limits.WORKER_MODELS_MAX)]
    load: Load
    speed: Annotated[float, Meta(ge=0, le=limits.SPEED_MAX)] = 1.0
    beats: bool = True
    token: Annotated[bytes, Meta(max_length=64)] = b""
    carried: Annotated[list[Carried], Meta(max_length=limits.LIST_LENGTH_MAX)] = []
    minor: Unsigned32 = 0
    cells: Annotated[list[Unsigned63], Meta(max_length=limits.CELLS_MAX)] = []
    depth: Unsigned32 = 0


class Welcome(Struct, array_like=True, kw_only=True):
    """controller → peer: the session stands.

    Attributes:
        version: Of the protocol.
        build: Of the controller's program, for messages.
        epoch: The controller's own random number; it changes at a restart.
        session: Number of this session, never 0. A client's chunks begin with it.
        token: Random bytes to show in the next HELLO.
        beat_ms: A peer says that it is there so often, in milliseconds.
        lease_ms: A worker that was silent for so long is lost, in milliseconds.
        frame_bytes_max: No frame that is sent to this controller may be larger, in bytes.
        minor: The minor version that is spoken in this session: the lower one of both sides.
    """

    version: int
    build: str
    epoch: int
    session: Unsigned32
    token: bytes
    beat_ms: int
    lease_ms: int
    frame_bytes_max: int
    minor: Unsigned32 = 0


class Beat(Struct, array_like=True, gc=False):
    """Either way: I am here.

    Attributes:
        number: A client's is given back. To a worker, 0 asks for a LOAD at once, and another number answers one.
        streams: Whether the LOAD that is asked for is to tell how far each attempt is. Since version 2.1.
        wanting: To a worker: how many clients wait here for a slot of its models, so that it can share its slots between its
            controllers. Since version 2.4.
    """

    number: Unsigned63 = 0
    streams: bool = False
    wanting: Unsigned32 = 0


class Drain(Struct, array_like=True, gc=False):
    """controller → worker: an operator wants it to finish and leave.

    Attributes:
        limit_ms: How long it may take, in milliseconds; 0 for the worker's own limit.
        withdrawn: It is to stay and take requests again, unless its own host wants it to leave. Since version 2.1.
    """

    limit_ms: Unsigned32
    withdrawn: bool = False


class Goodbye(Struct, array_like=True, gc=False):
    """Either way: this session ends on purpose.

    Attributes:
        reason: For messages.
    """

    reason: OptionalName = ""
