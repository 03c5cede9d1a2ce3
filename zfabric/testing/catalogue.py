"""What the workers of a run serve: a few models under shared aliases, with capabilities that differ from worker to worker."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from msgspec import structs

from zfabric.testing.tasks import with_tasks
from zfabric.wire.messages import ModelInfo

MODELS: Final = ("alpha", "beta", "gamma")
#: Names that several models share: whoever serves them at the moment has them.
ALIASES: Final = ("chat", "vectors")
NAMES: Final = (*MODELS, *ALIASES)
#: Sampling parameters that all engines honour; "seed" is one that some do not.
PARAMETERS: Final = ["max_new_tokens", "temperature"]
#: What every worker of a uniform run offers, so that each answer can be continued at any of them.
ALL: Final = ["generate", "embed", "count_tokens", "resume"]


@dataclass(kw_only=True)
class EngineSpec:
    """One engine of a worker.

    Attributes:
        models: What it serves.
        stepped: Whether it steps all of its requests at once, or generates each of them.
        reports: Whether it tells its progress; one that does not is never to be taken for hung.
        odd_gauges: It tells figures that cannot be encoded.
        first_ms: Time before the first token of one request in a few.
        burst: Tokens of one delta.
        step_ms: Time of one step.
    """

    models: list[ModelInfo]
    stepped: bool = True
    reports: bool = True
    odd_gauges: bool = False
    first_ms: float = 0.0
    burst: int = 1
    step_ms: float = 10.0


def draw_engines(rng: random.Random, *, uniform: bool, resumes: bool) -> list[EngineSpec]:
    """The engines of one worker. In a uniform run all workers serve the first model with all that there is."""
    if uniform:
        capabilities = with_tasks(ALL if resumes else ALL[:-1])
        info = ModelInfo(
            name=MODELS[0], aliases=[ALIASES[0]], capabilities=list(capabilities), parameters=["seed", *PARAMETERS]
        )
        return [_engine(rng, [info])]
    names = rng.sample(MODELS, rng.randint(1, len(MODELS)))
    infos = [draw_model(rng, name) for name in names]
    _share_aliases(rng, infos)
    split = rng.randint(0, len(infos) - 1)
    parts = [part for part in (infos[:split], infos[split:]) if part]
    for index, part in enumerate(parts):
        for info in part:
            info.engine = index
    return [_engine(rng, part) for part in parts]


def draw_model(rng: random.Random, name: str) -> ModelInfo:
    """A model as one worker has it."""
    capabilities = [one for one in ALL if rng.random() < 0.7] or ["generate"]
    return ModelInfo(
        name=name,
        capabilities=with_tasks(capabilities),
        parameters=["seed", *PARAMETERS] if rng.random() < 0.8 else list(PARAMETERS),
        slots=rng.choice([0, 0, 0, 1, 2]),
    )


def redraw(rng: random.Random, models: list[ModelInfo]) -> list[ModelInfo]:
    """Another announcement of one engine: a model dropped, changed, put under other names, or all of them gone."""
    models = [structs.replace(info) for info in models]
    what = rng.choice(["drop", "change", "alias", "collide", "nothing"])
    if what == "nothing":
        return []
    chosen = rng.randrange(len(models)) if models else 0
    if not models:
        return models
    info = models[chosen]
    if what == "drop":
        del models[chosen]
    elif what == "change":
        models[chosen] = structs.replace(draw_model(rng, info.name), aliases=info.aliases, engine=info.engine)
    elif what == "alias":
        models[chosen] = structs.replace(info, aliases=[rng.choice(ALIASES)])
    else:
        models[chosen] = structs.replace(info, aliases=[rng.choice(MODELS)])
    return models


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How a worker goes about it: its slots and speed, whether it beats, and the tokens that it gathers into one chunk."""

    slots: int
    speed: float
    beats: bool
    stream_interval: int


def draw_habits(rng: random.Random) -> Habits:
    """Of one worker."""
    return Habits(
        slots=rng.choice([1, 2, 8]),
        speed=rng.choice([0.5, 1.0, 1.0, 4.0]),
        beats=rng.random() < 0.9,
        stream_interval=rng.choice([1, 1, 1, 4]),
    )


def names_of(infos: list[ModelInfo]) -> set[str]:
    """All names under which these can be asked for."""
    return {name for info in infos for name in (info.name, *info.aliases)}


def _engine(rng: random.Random, models: list[ModelInfo]) -> EngineSpec:
    reports = rng.random() < 0.7
    return EngineSpec(
        models=models,
        stepped=rng.random() < 0.6,
        reports=reports,
        first_ms=0.0 if reports or rng.random() < 0.7 else 7_000.0,
        burst=rng.choice([1, 1, 1, 1, 3, 40]),
        step_ms=rng.choice([2, 10, 40]),
    )


def _share_aliases(rng: random.Random, infos: list[ModelInfo]) -> None:
    """Give the aliases to models of this worker, each to one at most."""
    for alias in ALIASES:
        if rng.random() < 0.6:
            rng.choice(infos).aliases.append(alias)
