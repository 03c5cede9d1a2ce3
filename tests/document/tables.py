"""Kinds, errors, bounds, timings, and the states of a request, as tables."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import NODEFAULT, structs

from tests.document.fields import meanings_of
from tests.document.markdown import power, table
from zfabric import errors, limits
from zfabric.cli.log_events import EVENTS
from zfabric.core.controller.request_state import TERMINAL_GIVEN, TRANSITIONS, RequestEvent, RequestState
from zfabric.core.controller.scaling import Rule
from zfabric.core.recorder import MEANINGS
from zfabric.fleet import config, needs
from zfabric.testing import promises
from zfabric.wire import kinds
from zfabric.wire.kinds import Kind

#: Bounds that a peer has to keep, and what each is of.
_BOUNDS: Final = {
    "FRAME_BYTES_MAX": "bytes of a frame",
    "CONTROL_BODY_BYTES_MAX": "bytes of a message of one frame, but for CHUNKS, and of the envelope of ENDS",
    "HEADER_BYTES_MAX": "bytes of the envelope of SUBMIT and of DISPATCH",
    "REQUEST_VALUES_MAX": "values in the body of a request, those in lists and maps counted",
    "REQUEST_PARTS_MAX": "texts, lists, maps and binary values among them",
    "REQUEST_TEXT_BYTES_MAX": "bytes of all its texts together",
    "NAME_LENGTH_MAX": "characters of a name",
    "MESSAGE_LENGTH_MAX": "characters of an error's message",
    "LIST_LENGTH_MAX": "elements of a list of claims, cancels, credit lines, carried requests, or ends",
    "ATTEMPTS_MAX": "the number of an attempt",
    "PRIORITY_MAX": "a priority, and minus this the least",
    "DEADLINE_MAX_MS": "a deadline, in milliseconds",
    "CLIENT_REQUESTS_MAX": "requests in flight of one client",
    "WORKER_MODELS_MAX": "models of one worker, and engines",
    "SLOTS_MAX": "slots of one worker",
    "BAD_FRAMES_MAX": "messages without use of one connection, until it is not listened to any more",
    "PARKED_BYTES_MAX": "bytes that wait in the controller for one peer that does not read, until its session ends",
}
#: Timings that the pages speak of, and what each is.
_TIMINGS: Final = {
    "BEAT_MS": "`beat_ms` of a WELCOME, unless the controller is set otherwise",
    "LEASE_MS": "`lease_ms` of a WELCOME, unless the controller is set otherwise",
    "HELLO_RETRY_MS": "a HELLO that has no answer is said again after this, a quarter more or less by chance",
    "HELLO_JITTER_MS": "a HELLO after the first waits a random part of this, so that peers do not come all at once",
    "RECONNECT_MIN_MS": "first pause before another connection is tried; it grows at each try",
    "RECONNECT_MAX_MS": "longest such pause",
    "CLAIM_MS": "requests outlive a lost connection for this",
    "RECOVERY_MS": "a new controller waits for both ends of running streams for this",
    "FINISHED_MS": "a worker keeps finished answers for this at least, while it has a session",
    "MODEL_MEMORY_MS": "a model without workers is remembered for this, and its requests wait",
    "UNTAKEN_MS": "requests wait for workers that are there and take nothing for this",
    "STALL_MS": "an engine that has work and does not move for this hangs",
    "ZMTP_PING_MS": "interval of ZMTP's PING",
    "ZMTP_TIMEOUT_MS": "a connection that is silent for this after a PING is closed",
    "HANDSHAKE_MS": "a connection whose ZMTP handshake takes longer is closed",
}


def kinds_table() -> str:
    """All kinds of messages."""
    rows = [[f"`{kind:02x}`", f"[{kind.name}](protocol/messages.md#{kind.name.lower()})", _way(kind),
             "2" if kind in kinds.WITH_BODY else "1"] for kind in Kind]  # fmt: skip
    return table(["byte", "kind", "from → to", "frames"], rows)


def _way(kind: Kind) -> str:
    receivers = [name for name, group in (("client", kinds.TO_CLIENT), ("worker", kinds.TO_WORKER)) if kind in group]
    senders = [name for name, group in (("client", kinds.FROM_CLIENT), ("worker", kinds.FROM_WORKER)) if kind in group]
    if senders and receivers and kind in (kinds.CHUNKS, kinds.ENDS):
        return "worker → controller → client"
    ways = []
    if senders:
        ways.append(f"{' or '.join(senders)} → controller")
    if receivers:
        ways.append(f"controller → {' or '.join(receivers)}")
    return "; ".join(ways)


def errors_table() -> str:
    """All error codes."""
    rows = []
    for code, kind in sorted(errors.BY_CODE.items()):
        again = "next attempt" if code in errors.FAILOVER_CODES else "later" if kind.retryable else "no"
        meaning = " ".join((kind.__doc__ or "").split())
        rows.append([str(code), kind.__name__, again, meaning])
    return table(["code", "name", "again", "meaning"], rows)


def bounds_table() -> str:
    """Bounds of the wire."""
    rows = [[name, power(getattr(limits, name)), text] for name, text in _BOUNDS.items()]
    return table(["name", "at most", "of what"], rows)


def timings_table() -> str:
    """Times that the protocol speaks of."""
    rows = [[f"{name}", f"{getattr(limits, name):,} ms", text] for name, text in _TIMINGS.items()]
    return table(["name", "value", "what it is"], rows)


def states_table() -> str:
    """States of an attempt at the controller."""
    meanings = meanings_of(RequestState)
    rows = [[state.name, meanings.get(state.name, ""), "yes" if state in TERMINAL_GIVEN else "no"]
            for state in RequestState]  # fmt: skip
    return table(["state", "meaning", "its client has had its terminal, or is gone"], rows)


def events_table() -> str:
    """What can happen to an attempt."""
    meanings = meanings_of(RequestEvent)
    return table(["event", "meaning"], [[event.name, meanings.get(event.name, "")] for event in RequestEvent])


def transitions_table() -> str:
    """From each state, by each event, to which."""
    rows = []
    for state, following in TRANSITIONS.items():
        if following:
            rows.append([state.name, *(following[e].name if e in following else "" for e in RequestEvent)])
    return table(["in", *(event.name for event in RequestEvent)], rows)


def promises_list() -> str:
    """What `zfabric.testing.conformance` asks for."""
    return "\n".join(f"- {promise.sentence}" for promise in promises.ALL)


def log_events_table() -> str:
    """What the daemons log."""
    rows = [(f"`{name}`", it.level, it.of, it.meaning) for name, it in sorted(EVENTS.items())]
    return table(("event", "level", "of", "meaning"), rows)


def recorded_events_table() -> str:
    """What a recording holds beside what is logged."""
    return table(("event", "meaning"), [(f"`{name}`", meaning) for name, meaning in MEANINGS.items()])


def fleet_file_table() -> str:
    """The keys of a fleet's file; the tables of settings have those of their programs."""
    rows: list[list[str]] = []
    places = (
        ("[fleet]", config.Common),
        ("[workers.NAME]", config.Group),
        ("[workers.NAME.scale]", Rule),
        ("[workers.NAME.ray]", needs.WorkerNeeds),
        ("[ray]", needs.OnRay),
        ("[ray.controller]", needs.Needs),
    )
    for place, kind in places:
        meanings = meanings_of(kind)
        rows += [
            [f"`{place}`", f"`{field.name}`", _shown(field), meanings[field.name]] for field in structs.fields(kind)
        ]
    meanings = meanings_of(config.Fleet)
    rows += [[f"`[{name}]`", "", "", meanings[name]] for name in ("controller", "gateway")]
    rows.append(["`[ray.gateway]`", "", "", "The same keys as `[ray.controller]`."])
    return table(["table", "key", "default", "meaning"], rows)


def _shown(field: structs.FieldInfo) -> str:
    """The default of a key, as the file would have it."""
    if field.required:
        return "needed"
    value = field.default if field.default is not NODEFAULT else field.default_factory()
    return "" if value is None or isinstance(value, msgspec.Struct) else f"`{msgspec.json.encode(value).decode()}`"
