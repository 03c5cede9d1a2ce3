"""A fleet's processes while they run: started in order, changed with their file, ended by signals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from zfabric.cli.daemon import on_hangup, on_signals
from zfabric.cli.fleet import Plan
from zfabric.cli.supervise import Keeping, Supervisor
from zfabric.client.aio import AsyncClient
from zfabric.errors import ConfigurationError, FabricError
from zfabric.limits import SCALE_LOOK_MS

#: By process, what it told when it was ready.
Told = dict[str, dict[str, str]]


class KeptFleet:
    """The processes of a plan, whoever keeps them going.

    Args:
        plan: What is to run.
        supervisor: Keeps the processes going.
        log: Called with an event and its fields.
    """

    def __init__(self, plan: Plan, supervisor: Keeping, log: Callable[..., Any]) -> None:
        self.plan = plan
        self._log = log
        self._supervisor = supervisor
        #: Workers that drain because fewer are wanted.
        self._leaving: dict[str, asyncio.Task[None]] = {}

    async def follow(self) -> None:
        """Have as many workers as the controller wants, until this call is cancelled. No rules, no questions."""
        while True:
            if self.plan.fleet.rules:
                async with AsyncClient(self.plan.endpoint, label="up") as client:
                    await self._follow(client)
            await asyncio.sleep(SCALE_LOOK_MS / 1_000)

    async def _follow(self, client: AsyncClient) -> None:
        """Do so as long as there are rules, at the endpoint that the client has. While nobody answers, numbers stay."""
        why = ""
        while self.plan.fleet.rules and self.plan.endpoint == client.endpoint:
            former, why = why, ""
            try:
                self.scale({row.model: row.desired for row in await client.scaling()})
            except FabricError as error:
                why = error.message
                if why != former:
                    self._log("scaling_unknown", error=why)
            await asyncio.sleep(SCALE_LOOK_MS / 1_000)

    def scale(self, desired: Mapping[str, int]) -> None:
        """Start workers of groups that have too few, and have those drain and end that are too many. Args: desired: By model."""
        for name, group in self.plan.fleet.workers.items():
            if group.scale is None or group.scale.model not in desired:
                continue
            wanted = min(desired[group.scale.model], group.most)
            there = self._supervisor.commands
            numbers = range(group.most)
            running = [
                n for n in numbers if (called := self.plan.name_of(name, n)) in there and called not in self._leaving
            ]
            free = [n for n in numbers if self.plan.name_of(name, n) not in there]
            coming, leaving = free[: max(0, wanted - len(running))], running[wanted:]
            if coming or leaving:
                self._log("scaled", group=name, former=len(running), now=len(running) + len(coming) - len(leaving))
            for number in coming:
                self._supervisor.keep(self.plan.worker(name, number))
            for number in leaving:
                self._leave(self.plan.name_of(name, number))

    def _leave(self, name: str) -> None:
        task = self._leaving[name] = asyncio.create_task(self._supervisor.remove(name), name=f"leave-{name}")
        task.add_done_callback(lambda _: self._leaving.pop(name))

    async def stop(self) -> None:
        """End all: the gateway, the controller, and the workers."""
        await self._supervisor.stop()

    async def change(self, plan: Plan) -> None:
        """Have another plan run. What is the same in both goes on, and reads its own files anew; what else there is now is
        started, workers that change are restarted one after the other, and what is gone ends."""
        former = self._supervisor.commands
        wanted = {command.name: command for command in plan.all(former.keys() - self._leaving.keys())}
        same = [name for name, command in wanted.items() if former.get(name) == command]
        changed = [name for name in wanted if name in former and name not in same]
        new = [name for name in wanted if name not in former]
        gone = [name for name in former if name not in wanted and name not in self._leaving]
        self.plan = plan
        self._supervisor.limit_s = plan.fleet.fleet.stop_ms / 1_000
        self._supervisor.hang_up(same)
        started = [self._supervisor.keep(wanted[name]) for name in new]
        for name in changed:
            await self._supervisor.remove(name)
            await self._supervisor.keep(wanted[name]).wait()
        for tried in started:
            await tried.wait()
        await asyncio.gather(*(self._supervisor.remove(name) for name in gone))
        self._log("fleet_changed", started=new, restarted=changed, stopped=gone, kept=same)


class RunningFleet(KeptFleet):
    """The processes of a plan on this host.

    Args:
        plan: What is to run.
        log: Called with an event and its fields.
    """

    def __init__(self, plan: Plan, log: Callable[..., Any]) -> None:
        self._children = Supervisor(log, plan.fleet.fleet.stop_ms / 1_000)
        super().__init__(plan, self._children, log)

    async def start(self) -> Told:
        """Start all: the controller, then the workers at once, then the gateway.

        Raises:
            ConfigurationError: One ended before it was ready, or all are being stopped.
        """
        told: Told = {}
        controller, gateway = self.plan.controller(), self.plan.gateway()
        workers = self.plan.workers()
        for stage in ([controller], workers, [gateway]):
            commands = [command for command in stage if command is not None]
            answers = await asyncio.gather(*(self._children.add(command) for command in commands))
            told |= zip((command.name for command in commands), answers, strict=True)
        return told


async def run_fleet(
    plan: Plan,
    log: Callable[..., Any],
    on_ready: Callable[[Told], Awaitable[None]],
    read: Callable[[], Plan] | None = None,
) -> int:
    """Run a fleet until a signal.

    Args:
        plan: What is to run.
        log: Called with an event and its fields.
        on_ready: Called when all is ready.
        read: Reads the plan anew at SIGHUP.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: One ended before it was ready; all others have been ended.
    """
    running = RunningFleet(plan, log)
    stopping, stopped, started = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stop() -> None:
        stopping.set()
        await running.stop()
        stopped.set()

    async def reload() -> None:
        assert read is not None
        await started.wait()
        try:
            await running.change(read())
        except ConfigurationError as error:
            log("fleet_kept", error=error.message)

    on_signals(stop)
    if read is not None:
        on_hangup(reload)
    try:
        told = await running.start()
    except ConfigurationError:
        if not stopping.is_set():
            await running.stop()
            raise
    else:
        started.set()
        await on_ready(told)
        following = asyncio.create_task(running.follow(), name="follow")
        await stopping.wait()
        following.cancel()
    await stopped.wait()
    return 0
