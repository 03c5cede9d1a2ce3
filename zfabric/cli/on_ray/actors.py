"""The actors of a fleet's processes: made, found again, and ended when their processes have drained."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from zfabric.cli.children import Command
from zfabric.cli.on_ray.cluster import CONTROLLER, FLEET, found, make, names
from zfabric.cli.on_ray.keeper import Keeper, Order
from zfabric.cli.on_ray.placing import Placed
from zfabric.fleet.limits import RAY_AGAIN_MS, RAY_ANSWER_MS, RAY_PENDING_MS


class ActorSupervisor:
    """Keeps commands going as actors, as `supervise.Supervisor` does as children.

    Args:
        order: What an actor is told for a command.
        namespace: Where the actors have their names.
        log: Called with an event and its fields.
        limit_s: How long a process may drain, where the actor has not been told so itself.
    """

    def __init__(
        self, order: Callable[[Placed], Order], namespace: str, log: Callable[..., Any], limit_s: float
    ) -> None:
        self.limit_s = limit_s
        self._order = order
        self._namespace = namespace
        self._log = log
        self._commands: dict[str, Placed] = {}
        #: By name, what starts one or ends one; the next waits for it.
        self._work: dict[str, asyncio.Task[None]] = {}

    @property
    def commands(self) -> dict[str, Command]:
        """What is kept going, by name."""
        return dict(self._commands)

    async def adopt(self) -> None:
        """Take over what runs in the namespace already. What is ending there goes on doing so."""
        there = [name for name in await names(self._namespace) if name != FLEET]
        await asyncio.gather(*(self._adopt(name) for name in there))

    async def _adopt(self, name: str) -> None:
        actor = await found(name, self._namespace)
        order = None if actor is None else await _answer(actor.order.remote())
        if actor is None or order is None:
            # One that waits for a node is made anew where it is wanted, which costs it nothing.
            await self._end(actor, await _group(name))
            self._log("child_stopped", name=name)
            return
        told = await _answer(actor.told.remote())
        if told is None or told.state in ("ending", "ended"):
            self._spawn(name, self.remove(name))
        else:
            self._commands[name] = order.command

    def keep(self, command: Command) -> asyncio.Event:
        """Have an actor started soon. Ray starts it again when it ends, and the actor its process.

        Returns:
            What is set when the process is ready, has ended without, or still waits for resources after a while.
        """
        assert isinstance(command, Placed)
        tried = asyncio.Event()
        self._commands[command.name] = command
        self._spawn(command.name, self._start(command, tried, self._work.get(command.name)))
        return tried

    async def remove(self, name: str) -> None:
        """Have a process drain, and end its actor then. One that is not there is no mistake."""
        former = self._work.get(name)
        if former is not None and former is not asyncio.current_task():
            former.cancel()
            await asyncio.wait([former])
        command = self._commands.get(name)
        actor, group = await found(name, self._namespace), await _group(name)
        if actor is not None and await _answer(actor.told.remote()) is not None:
            await self._drain(actor)
        await self._end(actor, group)
        if command is not None and self._commands.get(name) is command:
            del self._commands[name]
        self._log("child_stopped", name=name)

    async def stop(self) -> None:
        """End all, stage after stage."""
        commands = sorted(self._commands.values(), key=lambda command: command.stage)
        for _, stage in groupby(commands, key=lambda command: command.stage):
            await asyncio.gather(*(self.remove(command.name) for command in stage))
        await asyncio.gather(*self._work.values(), return_exceptions=True)

    def hang_up(self, names: Iterable[str]) -> None:
        """Have those of these names read their files anew."""
        for name in names:
            self._spawn(f"{name} hang up", self._hang_up(name, anyway=True))

    async def mend(self) -> None:
        """Start anew what somebody has ended by its actor, and tell a controller that Ray has started anew what its rules are."""
        there = set(await names(self._namespace))
        for name, command in list(self._commands.items()):
            if name not in there and name not in self._work:
                self._log("actor_missing", name=name)
                self.keep(command)
        if CONTROLLER in there and CONTROLLER not in self._work:
            await self._hang_up(CONTROLLER, anyway=False)

    async def _start(self, command: Placed, tried: asyncio.Event, former: asyncio.Task[None] | None) -> None:
        from ray.exceptions import RayError

        try:
            if former is not None:
                await asyncio.wait([former])
            options = self._placed(command)
            while True:
                try:
                    actor = make(Keeper, command.name, self._namespace, self._order(command), **options)
                    break
                except ValueError as error:
                    if "already taken" not in str(error):
                        raise
                    # Ray ends actors in its own time.
                    await asyncio.sleep(RAY_AGAIN_MS / 1_000)
            if await _answer(actor.order.remote(), RAY_PENDING_MS) is None:
                tried.set()
            # What has no name any more was ended by somebody.
            while await found(command.name, self._namespace) is not None:
                try:
                    await actor.tried.remote()
                    break
                except RayError:
                    await asyncio.sleep(RAY_AGAIN_MS / 1_000)
        finally:
            tried.set()

    def _placed(self, command: Placed) -> dict[str, Any]:
        """Where the actor may run, as Ray wants to have it said."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = command.placement
        options: dict[str, Any] = {
            "num_cpus": needs.num_cpus, "num_gpus": needs.num_gpus, "resources": dict(needs.resources),
        }  # fmt: skip
        if needs.bundles:
            group = ray.util.placement_group(
                [dict(bundle) for bundle in needs.bundles], strategy=needs.strategy, name=command.name,
                lifetime="detached",
            )  # fmt: skip
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=0
            )
        return options

    async def _drain(self, actor: Any) -> None:
        """Wait until an actor's process has drained, wherever it is meanwhile."""
        from ray.exceptions import RayError

        # The actor keeps to the time that it was told; what has not ended long after that has gone.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * self.limit_s):
                while True:
                    try:
                        await actor.stop.remote()
                        return
                    except RayError:
                        if await _answer(actor.told.remote()) is None:
                            return

    async def _end(self, actor: Any | None, group: Any | None) -> None:
        """End an actor for good, and free what its placement group holds. By now others may have their name."""
        import ray

        if actor is not None:
            ray.kill(actor, no_restart=True)
        if group is not None:
            ray.util.remove_placement_group(group)

    async def _hang_up(self, name: str, *, anyway: bool) -> None:
        actor, command = await found(name, self._namespace), self._commands.get(name)
        if actor is not None and command is not None:
            await _answer(actor.hang_up.remote(self._order(command).fleet, anyway=anyway))

    def _spawn(self, name: str, work: Any) -> None:
        task = self._work[name] = asyncio.create_task(work, name=name)
        task.add_done_callback(lambda done: self._work.pop(name, None) if self._work.get(name) is done else None)


async def _group(name: str) -> Any | None:
    """A placement group by its name; None if there is none."""
    import ray

    try:
        return await asyncio.to_thread(ray.util.get_placement_group, name)
    except ValueError:
        return None


async def _answer(reference: Any, within_ms: int = RAY_ANSWER_MS) -> Any | None:
    """What an actor answers; None if it is not there."""
    from ray.exceptions import RayError

    try:
        async with asyncio.timeout(within_ms / 1_000):
            return await reference
    except (TimeoutError, RayError):
        return None
