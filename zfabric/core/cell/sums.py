"""What a cell announces: the sum of its workers.

What a request can demand of a worker (an operation, to go on in mid-answer) is the union: the cell's own dispatch finds the
worker that suits it. What its dispatch cannot go by (parameters, messages, images, keys of `extra`, the context's length) is what
all of them have, so that no request fails in a cell that the cell has promised to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from zfabric.core.controller.broker import Broker
from zfabric.core.controller.hosting import Hosting, Model
from zfabric.core.controller.peers import WorkerState
from zfabric.limits import SLOTS_MAX, SPEED_MAX, WORKER_MODELS_MAX
from zfabric.wire.load import Load
from zfabric.wire.messages import ModelInfo

#: Operations whose requests a worker looks at for messages and images.
_READ: Final = frozenset({"generate", "count_tokens", "tokenize"})
#: What a worker may announce beside operations.
_ABILITIES: Final = frozenset({"chat", "multimodal", "resume"})
#: Aliases of one model that can be announced.
_ALIASES_MAX: Final = 64
T = TypeVar("T")
_UNSIGNED32: Final = 2**32 - 1
_UNSIGNED63: Final = 2**63 - 1


def summed_models(broker: Broker) -> tuple[list[ModelInfo], list[str]]:
    """All models that workers of a controller serve, and adapters that they load when asked, each once, by name.

    Costs O(hosts of all models).

    Returns:
        What can be announced, and the names of what finds no room in an announcement, adapters that nobody has loaded first.
    """
    registry = broker.registry
    hosted = {name: summed(model, _aliases(broker, model)) for name, model in registry.models.items() if model.hosts}
    found = [hosted[name] for name in sorted(hosted)]
    if broker.config.adapters_per_host:
        found += [info for info in _adapters(broker) if info.name not in hosted]
    return found[:WORKER_MODELS_MAX], [info.name for info in found[WORKER_MODELS_MAX:]]


def _aliases(broker: Broker, model: Model) -> list[str]:
    """The aliases that stand for a model now, and are announced for it."""
    names = [name for name, alias in model.aliases.items() if alias.holders and broker.registry.find(name) is model]
    return sorted(names)[:_ALIASES_MAX]


def _adapters(broker: Broker) -> list[ModelInfo]:
    """Adapters that workers load when they are asked for one: the cell has one loaded for the request that wants it."""
    offers: dict[str, list[Hosting]] = {}
    for model in broker.registry.models.values():
        for host in model.hosts.values():
            for name in host.info.loadable:
                offers.setdefault(name, []).append(host)
    return [_sum(name, [], hosts) for name, hosts in sorted(offers.items())]


def summed(model: Model, aliases: Sequence[str] = ()) -> ModelInfo:
    """One model as all its hosts together serve it."""
    return _sum(model.name, aliases, list(model.hosts.values()))


def _sum(name: str, aliases: Sequence[str], hosts: list[Hosting]) -> ModelInfo:
    infos = [host.info for host in hosts]
    makers = [info for info in infos if "generate" in info.capabilities]
    dimensions = {info.dimensions for info in infos if info.dimensions}
    return ModelInfo(
        name=name,
        aliases=list(aliases),
        context_length=min(info.context_length for info in infos),
        capabilities=sorted(_capabilities([info.capabilities for info in infos])),
        parameters=_common([info.parameters for info in makers or infos]),
        dimensions=dimensions.pop() if len(dimensions) == 1 else 0,
        slots=_slots(hosts),
        details=_agreed([info.details for info in infos]),
        defaults=_agreed([info.defaults for info in makers]),
        extra=_common([info.extra for info in makers]),
    )


def _capabilities(lists: Sequence[list[str]]) -> set[str]:
    """Operations are the union, and what no dispatch goes by is what all have. To go on is asked of who makes text alone."""
    sets = [frozenset(able) for able in _distinct(lists)]
    found = set().union(*sets) - _ABILITIES
    readers = [able for able in sets if able & _READ]
    for ability in ("chat", "multimodal"):
        if readers and all(ability in able for able in readers):
            found.add(ability)
    if any({"generate", "resume"} <= able for able in sets):
        found.add("resume")
    return found


def _common(lists: Sequence[list[str] | None]) -> list[str] | None:
    """What all lists have; None stands for everything."""
    known = [set(names) for names in _distinct(lists) if names is not None]
    if not lists:
        return []
    return sorted(set.intersection(*known)) if known else None


def _distinct(values: Sequence[T]) -> list[T]:
    """Each value once. Workers of one kind say the same, which is far sooner compared than added up."""
    found: list[T] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _agreed(maps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all maps have, with the same value."""
    if not maps:
        return {}
    found = dict(maps[0])
    for other in maps[1:]:
        if other is not maps[0] and other != found:
            found = {key: value for key, value in found.items() if key in other and other[key] == value}
    return found


def _slots(hosts: Iterable[Hosting]) -> int:
    """Requests of a model at once, by those hosts that take any. At least one, since none would stand for any number."""
    slots = sum(
        min(host.slots or host.worker.load.slots, host.worker.load.slots)
        for host in hosts
        if host.worker.state is WorkerState.READY
    )
    return min(max(1, slots), SLOTS_MAX)


def summed_speed(broker: Broker) -> float:
    """Relative speed of all workers that take requests together, by which a parent weighs the load of a cell."""
    workers = broker.registry.workers.values()
    return min(sum(worker.speed for worker in workers if worker.state is WorkerState.READY), SPEED_MAX)


class Room(NamedTuple):
    """What a cell has room for.

    Attributes:
        slots: Those that are told.
        queued: Requests that wait in the cell's queues.
    """

    slots: int
    queued: int


def summed_room(broker: Broker, held: int, waiting: Callable[[], int]) -> Room:
    """The slots of a cell: those that are free, and the ones that the parent has. Where none is free since the cell's own clients
    wait as well, one more: what the parent sends takes turns with theirs. Costs O(workers + models), and is asked often.

    Args:
        held: Requests of the parent's that the cell has.
        waiting: Those of them that no worker has yet; asked where any request waits.
    """
    free = slots = 0
    for worker in broker.registry.workers.values():
        if worker.state is WorkerState.READY:
            here = worker.load.slots - worker.load.elsewhere
            left = here - len(worker.live) + len(worker.aside) if not worker.hung else worker.free
            slots += here
            free += left if left > 0 else 0
    queued = sum([len(model.queue) for model in broker.registry.models.values()])
    behind = waiting() if queued else 0
    own_turn = int(queued > behind == 0)
    return Room(min(held - behind + max(free, own_turn), SLOTS_MAX) if slots else 0, queued)


def summed_load(broker: Broker) -> Load:
    """How all workers of a controller are, but for their slots. Costs O(workers)."""
    load = Load(engines=[None])
    blocks: list[int] = []
    workers = broker.registry.workers.values()
    for worker in workers:
        told = worker.load
        load.running += told.running
        load.waiting += told.waiting
        load.progress += told.progress
        load.tokens_per_second += told.tokens_per_second
        if told.kv_blocks_free is not None:
            blocks.append(told.kv_blocks_free)
    load.kv_blocks_free = min(sum(blocks), _UNSIGNED63) if blocks else None
    load.running, load.waiting = min(load.running, _UNSIGNED32), min(load.waiting, _UNSIGNED32)
    load.progress &= _UNSIGNED63
    load.tokens_per_second = round(load.tokens_per_second, 1)
    load.gauges = {"cell_workers": float(len(workers)), "cell_queued": 0.0}
    return load
