"""Settings of a running controller: which can be changed, why others cannot, and the change itself.

A change is checked as at the start, by `BrokerConfig`, and holds until the controller ends: its file is its operator's.
"""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final

from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.directives import check_room
from zfabric.core.controller.dispatch import find_policy
from zfabric.core.controller.peers import WorkerPeer
from zfabric.errors import ConfigurationError, NoWorkerError, UnknownModelError
from zfabric.limits import SPEED_MAX, WEIGHT_MAX
from zfabric.wire.steering import Setting

if TYPE_CHECKING:
    from zfabric.core.controller.broker import Broker

#: Settings that every use reads anew.
_CHANGEABLE: Final = {
    "policy": "the next request is dispatched by it",
    "stall_ms": "the next load report is judged by it",
    "claim_ms": "it holds for connections that are lost from now on",
    "queue_depth_max": "it holds for requests that come from now on",
    "queue_bytes_max": "it holds for requests that come from now on",
    "client_requests_max": "it holds for requests that come from now on",
    "clients_max": "it holds for clients that come from now on",
    "workers_max": "it holds for workers that come from now on",
    "circuit_failures": "the next failure is judged by it",
    "imbalance_requests": "the next request is dispatched by it",
    "imbalance_ratio": "the next request is dispatched by it",
    "adapters_per_host": "the next adapter is loaded by it",
    "adapter_idle_ms": "the next look at what is idle goes by it",
    "adapter_spread": "the next request that waits or is dispatched is counted by it",
}
_FIXED: Final = {
    "beat_ms": "each peer was told it when it came, and beats by it",
    "lease_ms": "each peer was told it when it came, and judges the controller by it",
    "recovery_ms": "it counts from the start of the controller, and is over",
}
#: What a worker's speed is called among the settings.
_SPEED: Final = "speed."
#: And a model's weight.
_WEIGHT: Final = "weight."

assert {*_CHANGEABLE, *_FIXED} == {field.name for field in fields(BrokerConfig)}


def shown(broker: Broker) -> list[Setting]:
    """All settings as they are, the speeds of all workers, and the weights of all models."""
    directives = broker.registry.directives
    rows = [
        Setting(
            name=field.name,
            value=getattr(broker.config, field.name),
            default=field.default,  # type: ignore[arg-type]
            changeable=field.name in _CHANGEABLE,
            why=_CHANGEABLE.get(field.name) or _FIXED[field.name],
            changed_by=directives.changes.get(field.name, ""),
        )
        for field in fields(BrokerConfig)
    ]
    return (
        rows
        + [
            Setting(
                name=_SPEED + name,
                value=worker.speed,
                default=worker.announced_speed,
                changeable=True,
                why="the weight of its worker for lottery, and what shortest_queue divides by",
                changed_by=directives.changes.get(_SPEED + name, ""),
            )
            for name, worker in sorted(broker.registry.workers.items())
        ]
        + [
            Setting(
                name=_WEIGHT + name,
                value=model.queue.weight,
                default=1,
                changeable=True,
                why="how many of its requests go in one turn where a worker has requests of several models to take",
                changed_by=directives.changes.get(_WEIGHT + name, ""),
            )
            for name, model in sorted(broker.registry.models.items())
        ]
    )


def change(broker: Broker, name: str, value: Any, by: str) -> Setting:
    """Change one setting; the value None is the one that it had at the start.

    Returns:
        How it is now.

    Raises:
        ConfigurationError: There is no such setting, it cannot be changed at run time, or not to this value.
        NoWorkerError: The speed is of no worker.
        UnknownModelError: The weight is of no model.
    """
    former: object
    now: object
    if name.startswith(_SPEED):
        former, now = _change_speed(broker, name.removeprefix(_SPEED), value)
    elif name.startswith(_WEIGHT):
        former, now = _change_weight(broker, name.removeprefix(_WEIGHT), value)
    else:
        former, now = _change_config(broker, name, value)
    broker.registry.directives.changes[name] = by
    broker.registry.revision += 1
    broker.journal.note("config_changed", setting=name, former=former, now=now, by=by)
    return next(row for row in shown(broker) if row.name == name)


def _change_config(broker: Broker, name: str, value: Any) -> tuple[object, object]:
    if name in _FIXED:
        raise ConfigurationError(f"{name} cannot be changed while the controller runs: {_FIXED[name]}", setting=name)
    if name not in _CHANGEABLE:
        close = difflib.get_close_matches(name, [*_CHANGEABLE, *_FIXED], n=1)
        raise ConfigurationError(
            f"there is no setting {name!r}{f', did you mean {close[0]}?' if close else ''}", setting=name
        )
    config = broker.config
    former = getattr(config, name)
    wanted = broker.started_with[name] if value is None else value
    if type(former) is float and type(wanted) is int:
        wanted = float(wanted)
    if type(wanted) is not type(former):
        kinds = {str: "a name", int: "an integer", float: "a number"}
        raise ConfigurationError(f"{name} must be {kinds[type(former)]}, {wanted!r} is none", setting=name)
    if name == "policy":
        find_policy(wanted)
    replace(config, **{name: wanted})
    setattr(config, name, wanted)
    if name == "policy" and wanted != former:
        broker.scheduler.figures.policy_changes(former)
        broker.scheduler.chooser.use(wanted)
    return former, wanted


def _change_speed(broker: Broker, name: str, value: Any) -> tuple[float, float]:
    worker = broker.registry.workers.get(name)
    if worker is None:
        raise NoWorkerError(f"no worker is named {name!r}", worker=name)
    former, speeds = worker.speed, broker.registry.directives.speeds
    if value is None:
        speeds.pop(name, None)
    else:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= SPEED_MAX:
            raise ConfigurationError(
                f"{_SPEED}{name} must be a number 0 … {SPEED_MAX:g}, {value!r} is none", setting=name
            )
        speeds[name] = float(value)
    set_speed(broker, worker)
    return former, worker.speed


def _change_weight(broker: Broker, name: str, value: Any) -> tuple[int, int]:
    model, weights = broker.registry.models.get(name), broker.registry.directives.weights
    if model is None:
        raise UnknownModelError(f"no worker serves a model named {name!r}", model=name)
    if value is None:
        weights.pop(name, None)
    elif type(value) is not int or not 1 <= value <= WEIGHT_MAX:
        raise ConfigurationError(
            f"{_WEIGHT}{name} must be an integer 1 … {WEIGHT_MAX}, {value!r} is none", setting=name
        )
    else:
        check_room(weights, name)
        weights[name] = value
    former, model.queue.weight = model.queue.weight, weights.get(name, 1)
    return former, model.queue.weight


def set_speed(broker: Broker, worker: WorkerPeer) -> None:
    """Have a worker's speed be what an operator wants, or else what the worker announced."""
    worker.speed = broker.registry.directives.speeds.get(worker.name, worker.announced_speed)
    for host in worker.hosts.values():
        host.speed = worker.speed
    broker.registry.refresh(worker)
