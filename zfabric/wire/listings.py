"""Who waits, where, for how long and why: the rows of an operator's lists, which are results of QUERY.

A list is bounded: it has as many rows as were asked for, and says how many it leaves out.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

#: Why a request is where it is.
Reason = Literal[
    "", "paused", "recovering", "no_worker", "capability", "not_taking", "slots", "claimed", "unclaimed", "client_away",
    "stopping", "loading",
]  # fmt: skip


class RequestStatus(Struct, kw_only=True):
    """One attempt of a request.

    Attributes:
        request: Its name, as its client, logs and workers have it.
        attempt: 0, then one more each time that it was submitted again.
        client: Label of its client, or the number of its session; "" if nobody waits for it.
        client_number: Number of the client's session; 0 if nobody waits for it.
        operation: What is asked.
        model: The model's own name; "" for an operator's call.
        asked: The name that was asked for, which may be an alias.
        state: A state of an attempt at the controller, in small letters: "queued", "running", "finished", ….
        priority: The lesser goes first.
        place: Where it stands in its queue, from 1: how many go before it if nobody comes and goes, and none is served for its
            age. None if it does not wait.
        worker: Who has it; "" if nobody.
        age_s: Seconds since it was accepted; None if a former controller did that.
        waited_s: Seconds that it has waited, or did until a worker had it; None if a former controller knows.
        running_s: Seconds since a worker has it; None if none has, or since a time that only a former controller knows.
        deadline_s: Seconds that are left of its deadline; None if it has none.
        units: Tokens so far, as far as its client or its worker have told: an operator's question has workers tell it
            again, for the next one.
        size: Bytes of its body while it waits.
        reason: Why it is not at a worker, or what holds it where it is: one word for programs, "" if it just runs.
        why: The same as a sentence, with figures.
    """

    request: str
    attempt: int
    client: str
    client_number: int
    operation: str
    model: str
    asked: str
    state: str
    priority: int
    place: int | None
    worker: str
    age_s: float | None
    waited_s: float | None
    running_s: float | None
    deadline_s: float | None
    units: int
    size: int
    reason: Reason = ""
    why: str = ""


class ClientStatus(Struct, kw_only=True):
    """One client.

    Attributes:
        client: Its label, or the number of its session.
        number: Of its session.
        state: "connected", or "away" while it may come back after a lost connection.
        key: Name of its key, "everybody" on a fabric without keys.
        waiting: Its requests that wait for a worker.
        running: Its requests that a worker has.
        longest_wait_s: Seconds that the oldest of those that wait has waited; 0 if none does.
        age_s: Seconds since it first came.
        silence_s: Seconds since anything but the confirmation of bytes was heard of it.
        buffered_bytes: Bytes that wait in the controller for it to read them.
        build: Version of its program.
        minor: Minor version of the protocol that is spoken with it.
    """

    client: str
    number: int
    state: str
    key: str
    waiting: int
    running: int
    longest_wait_s: float
    age_s: float
    silence_s: float
    buffered_bytes: int
    build: str = ""
    minor: int = 0


class QueueStatus(Struct, kw_only=True):
    """What waits for one model and demands the same of a worker.

    Attributes:
        model: The model's own name.
        operation: What is asked.
        resumes: Whether answers are to go on in the middle.
        waiting: Requests.
        size: Bytes of their bodies.
        clients: Clients that they are of.
        longest_wait_s: Seconds that the oldest has waited.
        workers: Workers that can do it.
        taking: Of those, how many take requests.
        free: Of those, how many have a slot free.
        ends_s: Seconds until what waits is given up, if nothing changes; None if that is not in sight.
        reason: Why it waits, as in RequestStatus.
        why: The same as a sentence.
    """

    model: str
    operation: str
    resumes: bool
    waiting: int
    size: int
    clients: int
    longest_wait_s: float
    workers: int
    taking: int
    free: int
    ends_s: float | None
    reason: Reason = ""
    why: str = ""


class RequestList(Struct, kw_only=True):
    """Attempts that a question asked for.

    Attributes:
        rows: Those that were asked for, in the order that was asked for.
        total: How many there are that match.
        left_out: How many come after the last row.
    """

    rows: list[RequestStatus]
    total: int
    left_out: int


class ClientList(Struct, kw_only=True):
    """Clients that a question asked for.

    Attributes:
        rows: Those that were asked for, in the order that was asked for.
        total: How many there are that match.
        left_out: How many come after the last row.
    """

    rows: list[ClientStatus]
    total: int
    left_out: int


class QueueList(Struct, kw_only=True):
    """Queues that a question asked for.

    Attributes:
        rows: Those that were asked for, in the order that was asked for.
        total: How many there are that match.
        left_out: How many come after the last row.
    """

    rows: list[QueueStatus]
    total: int
    left_out: int
