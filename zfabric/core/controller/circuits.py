"""Hosts whose requests fail one after the other get none for a while, and then one at a time until one succeeds.

A worker that fails at once always has the least load, so any policy that goes by load would send it most of the traffic. A
circuit is of one model at one worker:

* closed: requests go there. So many failures in a row as `circuit_failures` open it;
* open: none go there, for CIRCUIT_OPEN_MS at first and twice as long each time it opens again, up to CIRCUIT_OPEN_MS_MAX, all
  drawn within CIRCUIT_JITTER, so that hosts that failed together do not come back together;
* half open: one at a time goes there. A success closes the circuit, a failure opens it again.

Of the hosts that take requests for a demand no more than CIRCUIT_SHARE_MAX may be out, so never all: where nobody works, errors
are the better answer than silence. What else ends a request (its own fault, its deadline, a cancel, an overload) says nothing
of the host.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.journal import Journal
from zfabric.core.timers import Timer, Timers
from zfabric.errors import BackendError, OutOfMemoryError, WorkerTimeoutError
from zfabric.ids import milliseconds
from zfabric.limits import CIRCUIT_JITTER, CIRCUIT_OPEN_MS, CIRCUIT_OPEN_MS_MAX, CIRCUIT_SHARE_MAX

if TYPE_CHECKING:
    from zfabric.core.controller.hosting import Hosting, Model
    from zfabric.core.controller.peers import Key, Request, WorkerPeer
    from zfabric.core.controller.registry import Registry

#: The errors that speak against a host.
COUNTED_CODES: Final = frozenset(kind.code for kind in (BackendError, OutOfMemoryError, WorkerTimeoutError))


class Circuit:
    """How requests of one model at one worker fared lately.

    Attributes:
        failures: In a row, up to now.
        openings: In a row, without a success between them.
        timer: Ends its time open; None while it is closed or half open.
        out: Whether it is open or half open.
        probe: The attempt that was sent last while it was half open.
    """

    __slots__ = ("failures", "openings", "out", "probe", "timer")

    def __init__(self) -> None:
        self.failures = self.openings = 0
        self.timer: Timer | None = None
        self.out = False
        self.probe: Key | None = None

    def admits(self, host: Hosting) -> bool:
        """Whether a request may go to its host now."""
        return not self.out or (self.timer is None and self.probe not in host.live)

    @property
    def state(self) -> str:
        """One word."""
        return "closed" if not self.out else "half open" if self.timer is None else "open"


class Circuits:
    """Opens and closes circuits.

    Attributes:
        fill: Gives a worker that may take requests again what waits.
        openings: How often circuits opened.
    """

    def __init__(
        self, config: BrokerConfig, registry: Registry, timers: Timers, journal: Journal, rng: random.Random
    ) -> None:
        self._config = config
        self._registry = registry
        self._timers = timers
        self._journal = journal
        self._rng = rng
        self.fill: Callable[[WorkerPeer], None] = lambda worker: None
        self.openings = 0

    def sent(self, request: Request, host: Hosting) -> None:
        """A request is about to take a slot of a host."""
        if host.circuit is not None and host.circuit.out:
            host.circuit.probe = request.key

    def ended(self, request: Request, host: Hosting, code: int) -> None:
        """A worker ended a request. Costs O(hosts that are out) where that opens a circuit, else O(1)."""
        if host.model.hosts.get(host.name) is not host:
            # Its worker serves the model no more, or anew: the host that is there now has a circuit of its own.
            return
        circuit = host.circuit
        if code == 0:
            if circuit is not None:
                self._close(host, circuit)
            return
        if code not in COUNTED_CODES or not self._config.circuit_failures:
            return
        if circuit is None:
            circuit = host.circuit = Circuit()
        circuit.failures += 1
        if circuit.out:
            if circuit.timer is None and circuit.probe == request.key:
                self._open(host, circuit)
        elif circuit.failures >= self._config.circuit_failures and self._may_be_out(host):
            self._open(host, circuit)

    def fit(self, model: Model) -> None:
        """Hosts of a model came or went: close what would be more than the share that may be out, the longest out first.
        Costs O(hosts that are out)."""
        for name, host in list(model.out.items()):
            if model.hosts.get(name) is not host:
                del model.out[name]
        for supply in list(model.supplies.values()) if model.out else ():
            out = [host for name, host in model.out.items() if supply.taking.get(name) is host]
            for host in out[: max(0, len(out) - _most(len(supply.taking)))]:
                assert host.circuit is not None
                self._close(host, host.circuit)
                self.fill(host.worker)

    def _may_be_out(self, host: Hosting) -> bool:
        for demand in host.demands:
            taking = host.model.supplies[demand].taking
            out = sum(taking.get(name) is other for name, other in host.model.out.items())
            if host.name in taking and out + 1 > _most(len(taking)):
                return False
        return True

    def _open(self, host: Hosting, circuit: Circuit) -> None:
        circuit.out = True
        host.model.out[host.name] = host
        circuit.probe = None
        doubled = min(CIRCUIT_OPEN_MS << min(circuit.openings, 16), CIRCUIT_OPEN_MS_MAX)
        open_ms = round(doubled * self._rng.uniform(1 - CIRCUIT_JITTER, 1 + CIRCUIT_JITTER))
        circuit.openings += 1
        self.openings += 1
        due_ns = self._timers.now_ns + milliseconds(open_ms)
        circuit.timer = self._timers.at(due_ns, lambda _: self._half_open(host, circuit))
        self._journal.note(
            "circuit_opened", worker=host.name, model=host.model.name, failures=circuit.failures, open_ms=open_ms
        )
        self._registry.refresh(host.worker)

    def _half_open(self, host: Hosting, circuit: Circuit) -> None:
        circuit.timer = None
        if host.worker.hosts.get(host.model.name) is host:
            self._registry.refresh(host.worker)
            self.fill(host.worker)

    def _close(self, host: Hosting, circuit: Circuit) -> None:
        host.circuit = None
        if circuit.out:
            self._timers.cancel(circuit.timer)
            host.model.out.pop(host.name, None)
            self._journal.note("circuit_closed", worker=host.name, model=host.model.name)
            if host.worker.hosts.get(host.model.name) is host:
                self._registry.refresh(host.worker)


def _most(hosts: int) -> int:
    """How many of so many hosts may be out."""
    return int(hosts * CIRCUIT_SHARE_MAX)
