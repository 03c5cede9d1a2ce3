"""Bounds and timings of processes that are kept going on one host, each with its reason."""

from __future__ import annotations

from typing import Final

from zfabric.limits import DRAIN_MS, STOP_MS

#: A process that a supervisor keeps going is started again after this time, and after twice the time if it ends soon again.
RESTART_MIN_MS: Final = 250
RESTART_MAX_MS: Final = 30_000
#: By up to this share of it that time is shorter, by chance.
RESTART_JITTER: Final = 0.5
#: A child that has not drained in time is told to end at once, and gets so long for that before it is killed: it has but to
#: write what its buffers hold.
CHILD_FORCED_MS: Final = 2_000
#: The output of a child that has ended is read for so long: it waits in a pipe, unless somebody else holds the other end.
CHILD_OUTPUT_MS: Final = 1_000
#: Read of a child's output at a time; a line that is longer is passed on in pieces.
CHILD_READ_BYTES: Final = 65_536
#: How long a fleet may take to end: its gateway, its controller and its workers may drain one after the other, and all but the
#: first have little left to wait for.
FLEET_STOP_MS: Final = 2 * (DRAIN_MS + STOP_MS)
#: Workers of one group on one host: more than anybody has GPUs.
FLEET_REPLICAS_MAX: Final = 1_024
#: Calls that one actor on a Ray cluster may have open: each worker waits at the controller's for another endpoint.
RAY_CALLS_MAX: Final = 4 * FLEET_REPLICAS_MAX
#: How long such a wait lasts before it is begun anew.
RAY_WAIT_MS: Final = 30_000
#: An actor that does not answer is asked again after this time: it may be on its way to another node.
RAY_AGAIN_MS: Final = 500
#: An actor that has not answered for so long is not there: it waits for a node, or has lost one. One that is there answers
#: within some milliseconds, since it computes nothing itself.
RAY_ANSWER_MS: Final = 5_000
#: The same for who only looks: `zfabric ray status` shows it as one that waits.
RAY_TOLD_MS: Final = 1_000
#: A new process that waits for resources holds up those that are to be started or ended after it for so long.
RAY_PENDING_MS: Final = 10_000
#: How often a fleet is looked over for actors that somebody has ended.
RAY_MEND_MS: Final = 5_000
#: How often `zfabric ray up` asks how far the processes are.
RAY_LOOK_MS: Final = 300
#: How long it waits for all to be ready: models of hundreds of gigabytes take minutes to load.
RAY_UP_S: Final = 1_800.0
