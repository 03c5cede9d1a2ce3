"""A whole fabric in one thread, under one seed: for the project's own tests, and for authors of backends and policies.

`simulate(seed)` runs the real cores (broker, worker and client sessions) over a simulated clock and a network that fails
as ZeroMQ does, and checks the promises of docs/reliability.md while it runs and after it has healed. A failure names the
seed; ``python -m zfabric.testing --seed N`` replays it.
"""

from zfabric.testing.cluster import ClusterOptions, Report, simulate
from zfabric.testing.records import Violation

__all__ = ["ClusterOptions", "Report", "Violation", "simulate"]
