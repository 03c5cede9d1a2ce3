"""Names for the numbers and byte strings that travel together, so that a checker can tell them apart."""

from __future__ import annotations

from typing import NewType

#: The ROUTER's own name of one connection; it changes at each reconnect and is never told to anyone.
RoutingId = NewType("RoutingId", bytes)

#: A client's random name of one request (63 bits); with the client's instance it is unique in the fabric.
RequestId = NewType("RequestId", int)

#: Random 63-bit number of one run of one client or worker process.
InstanceId = NewType("InstanceId", int)

#: The controller's number of one client session: what a chunk is routed by. It dies with the session.
ClientNumber = NewType("ClientNumber", int)

WorkerName = NewType("WorkerName", str)
ModelName = NewType("ModelName", str)

#: Monotonic nanoseconds. Only differences mean anything.
Nanos = NewType("Nanos", int)


def milliseconds(value: float) -> int:
    """Milliseconds as nanoseconds."""
    return int(value * 1_000_000)
