"""What a controller counts: requests by model and outcome, how long they waited and took, and how they came to their worker.

Whatever is counted here is counted once for a request, never for a token. Models that nobody serves get no figures of their
own, so that nobody can fill this by asking for names.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from zfabric.core.controller.hosting import Model
from zfabric.core.histogram import Histogram
from zfabric.errors import BY_CODE, FabricError
from zfabric.limits import MEASURED_MODELS_MAX

Outcome = Literal["completed", "failed", "cancelled", "expired", "rejected"]
#: How a request came to its worker: a policy chose at once, a worker with a free slot took it from a queue, it was moved from
#: another model's queue, or its client named the worker.
Decision = Literal["chosen", "queued", "moved", "asked"]

OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
DECISIONS: Final[tuple[Decision, ...]] = get_args(Decision)
#: Stands for requests of models without figures of their own.
OTHER: Final = "other"


class ModelFigures:
    """Those of one model.

    Attributes:
        outcomes: Attempts that ended, by how.
        queue_time: From SUBMIT to the dispatch.
        whole_time: From SUBMIT to the end, for those that completed.
        failovers: Attempts beyond a request's first.
        resumptions: Attempts that went on in the middle of an answer.
    """

    __slots__ = ("failovers", "outcomes", "queue_time", "resumptions", "whole_time")

    def __init__(self) -> None:
        self.outcomes: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        self.queue_time = Histogram()
        self.whole_time = Histogram()
        self.failovers = 0
        self.resumptions = 0


class Figures:
    """Totals since the start.

    Attributes:
        submitted: Attempts accepted.
        queued_bytes: Bytes of the bodies that wait now.
        decisions: Dispatches by how they came about, since the policy is the present one.
        former_decisions: The same of policies that were in use before, by policy.
        failures: Attempts that ended with an error, by its code.
        models: By model.
    """

    __slots__ = ("decisions", "failures", "former_decisions", "models", "queued_bytes", "submitted")

    def __init__(self) -> None:
        self.submitted = 0
        self.queued_bytes = 0
        self.decisions: dict[Decision, int] = dict.fromkeys(DECISIONS, 0)
        self.failures: dict[int, int] = {}
        self.former_decisions: dict[tuple[str, Decision], int] = {}
        self.models: dict[str, ModelFigures] = {}

    def failed(self, code: int) -> None:
        """An attempt has ended with an error. Codes that no error of the tree has count as its root's: workers send them."""
        code = code if code in BY_CODE else FabricError.code
        self.failures[code] = self.failures.get(code, 0) + 1

    def of_model(self, model: Model | None) -> ModelFigures:
        """The figures of a model. One that nobody has served yet has none of its own."""
        served = model is not None and (model.hosts or model.name in self.models)
        return self.of(model.name if model is not None and served else OTHER)

    def of(self, model: str) -> ModelFigures:
        """A model's figures."""
        found = self.models.get(model)
        if found is None:
            name = model if len(self.models) < MEASURED_MODELS_MAX else OTHER
            found = self.models.setdefault(name, ModelFigures())
        return found

    def label_of(self, model: str) -> str:
        """What a model that is served is called in figures: by its name, which it keeps, or as one of those beyond the bound."""
        self.of(model)
        return model if model in self.models else OTHER

    def total(self, outcome: Outcome) -> int:
        """Attempts of all models that ended so."""
        return sum([figures.outcomes[outcome] for figures in self.models.values()])

    @property
    def dispatched(self) -> int:
        """Attempts given to workers."""
        return sum(self.decisions.values()) + sum(self.former_decisions.values())

    def policy_changes(self, former: str) -> None:
        """Another policy decides from now on."""
        self.former_decisions = self.by_policy(former)
        self.decisions = dict.fromkeys(DECISIONS, 0)

    def by_policy(self, present: str) -> dict[tuple[str, Decision], int]:
        """Dispatches by policy and by how they came about."""
        found = dict(self.former_decisions)
        for decision, count in self.decisions.items():
            found[present, decision] = found.get((present, decision), 0) + count
        return found
