"""For authors of backends and policies, and for the project's own tests.

`serving(backend)` runs a backend behind a real controller and a real worker in the test's own process, and gives a client;
`run_backend(backend)` is the same for tests that block. `conformance(backend)` asks for all that a
backend owes its callers, and names what it breaks.

A whole fabric in one thread, under one seed:

`simulate(seed)` runs the real cores (broker, worker and client sessions) over a simulated clock and a network that fails
as ZeroMQ does, and checks the promises of docs/reliability.md while it runs and after it has healed. A failure names the
seed; ``python -m zfabric.testing --seed N`` replays it. `simulate_recording(files)` does the same with the workers, requests and
losses of a flight recording (docs/operating.md), so that an incident becomes a test.
"""

from zfabric.testing.cluster import simulate
from zfabric.testing.conformance import conformance, examine
from zfabric.testing.incident import simulate_recording
from zfabric.testing.records import Violation
from zfabric.testing.reports import ClusterOptions, Report
from zfabric.testing.serving import run_backend, serving

__all__ = [
    "ClusterOptions",
    "Report",
    "Violation",
    "conformance",
    "examine",
    "run_backend",
    "serving",
    "simulate",
    "simulate_recording",
]
