"""Operators of a simulated fabric: what they order at any time, and that all of it is taken back in the end.

Their chance is their own, so that a run without them is the run that it was before there were any.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from zfabric.core.controller.dispatch import BUILT_IN
from zfabric.testing.apps import SimApp
from zfabric.testing.catalogue import NAMES
from zfabric.testing.clients import SimClient
from zfabric.testing.controllers import SimController
from zfabric.testing.workers import SimWorker
from zfabric.testing.world import World

_LISTS: Final = ("requests", "clients", "queue")


class Operators:
    """Orders by the hand of any client; without keys everybody is an operator, and with them some are told that they are none.

    Args:
        seed: Of the run.
    """

    def __init__(
        self,
        seed: int,
        world: World,
        controllers: list[SimController],
        workers: list[SimWorker],
        clients: list[SimClient | SimApp],
    ) -> None:
        self.rng = random.Random(f"{seed} operators")
        self.world = world
        self.controllers = controllers
        self.workers = workers
        self.clients = clients
        self._over = False
        #: What they do, by name.
        self.kinds: dict[str, Callable[[], None]] = {
            "model paused": self._pause,
            "worker held": lambda: self._drain(stay=True),
            "drain taken back": lambda: self._drain(stay=False),
            "request stopped": self._cancel,
            "client kicked": self._kick,
            "settings changed": self._configure,
        }

    def plan(self, fault_ms: int, inject: Callable[[str, Callable[[], None]], Callable[[], None]]) -> None:
        """In some runs some of them act, and others only look."""
        rng = self.rng
        if rng.random() < 0.5:
            return
        for name in rng.sample(sorted(self.kinds), rng.randint(1, 4)):
            for _ in range(rng.randint(1, 3)):
                self.world.after(rng.uniform(50, fault_ms * 0.9), inject(name, self.kinds[name]))
        for _ in range(rng.randint(0, 4)):
            self.world.after(rng.uniform(0, fault_ms * 0.9), self._look)

    def _ask(self, what: str, **arguments: object) -> None:
        client = self.rng.choice(self.clients)
        if client.alive and not self._over:
            client.ask(what, arguments)

    def _later(self, what: str, **arguments: object) -> None:
        self.world.after(self.rng.choice([50, 1_000, 4_000]), lambda: self._ask(what, **arguments))

    def _look(self) -> None:
        if self.rng.random() < 0.2:
            self._ask("config")
        else:
            self._ask(self.rng.choice(_LISTS), limit=self.rng.choice([1, 100]))

    def _pause(self) -> None:
        model = self.rng.choice(NAMES)
        self._ask("pause", model=model, wait_ms=self.rng.choice([0, 500, 3_000]))
        self._later("resume", model=model)

    def _drain(self, *, stay: bool) -> None:
        worker = self.rng.choice(self.workers)
        limit_ms = self.rng.choice([200, 5_000])
        if not stay:
            worker.is_queried_to_drain(limit_ms)
        self._ask("drain", worker=worker.name, limit_ms=limit_ms, stay=stay)
        self._later("undrain", worker=worker.name)

    def _cancel(self) -> None:
        """Something that is in flight, if anything is."""
        numbers = [f"{number:x}" for client in self.clients for number in client.session.requests]
        if numbers:
            self._ask("cancel", request=self.rng.choice(sorted(numbers)))

    def _kick(self) -> None:
        welcome = self.rng.choice(self.clients).session.welcome
        if welcome is not None:
            self._ask("kick", client=str(welcome.session), refuse_ms=self.rng.choice([0, 500, 3_000]))

    def _configure(self) -> None:
        if self.rng.random() < 0.5:
            self._ask("set_config", name="policy", value=self.rng.choice(BUILT_IN))
        else:
            name = f"speed.{self.rng.choice(self.workers).name}"
            self._ask("set_config", name=name, value=self.rng.choice([None, 0, 0.5, 8]))

    def heal(self) -> None:
        """What holds is taken back. An order that is still on its way may hold; it ends what waits for it in time."""
        self._over = True
        for controller in self.controllers:
            controller.take_back()
