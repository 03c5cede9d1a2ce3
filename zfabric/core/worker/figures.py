"""What a worker counts: how fast its answers come, how much they hold, and how they end.

Whatever is counted here is counted once or twice for a request, never for a token: a stream keeps when it began and when its
first unit came, and the rest is arithmetic at its end.
"""

from __future__ import annotations

from typing import Final

from zfabric.core.histogram import Histogram
from zfabric.core.worker.backlog import Backlog
from zfabric.errors import BY_CODE, FabricError
from zfabric.limits import MEASURED_MODELS_MAX
from zfabric.wire.answers import Outcome

#: Stands for requests of models without figures of their own.
OTHER: Final = "other"


class ModelFigures:
    """Those of one model.

    Attributes:
        first_token: From the DISPATCH to the first unit.
        between_tokens: From one unit to the next: of each answer that completed the mean, as often as it has units after the
            first.
        whole_time: From the DISPATCH to the end, for those that completed.
        completed: How many those are.
        prompt_tokens, cached_tokens: Of prompts, and of these what a cache had, as engines say.
        generation_tokens: Tokens of answers that were made here.
    """

    __slots__ = (
        "between_tokens", "cached_tokens", "completed", "first_token", "generation_tokens", "prompt_tokens", "whole_time",
    )  # fmt: skip

    def __init__(self) -> None:
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self.whole_time = Histogram()
        self.completed = 0
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0


class WorkerFigures:
    """Totals since the start.

    Attributes:
        models: By model.
        failures: Requests that ended with an error, by its code.
        credit_waits: How long streams waited for their readers, once each wait is over.
        credit_waiting: Waits that have begun.
    """

    __slots__ = ("credit_waiting", "credit_waits", "failures", "models")

    def __init__(self) -> None:
        self.models: dict[str, ModelFigures] = {}
        self.failures: dict[int, int] = {}
        self.credit_waits = Histogram()
        self.credit_waiting = 0

    def of(self, model: str) -> ModelFigures:
        """A model's figures."""
        found = self.models.get(model)
        if found is None:
            name = model if model and len(self.models) < MEASURED_MODELS_MAX else OTHER
            found = self.models.setdefault(name, ModelFigures())
        return found

    def began(self, stream: Backlog, now_ns: int) -> None:
        """The first unit of a stream is there."""
        self.of(stream.model).first_token.observe(now_ns - stream.began_ns)

    def ended(self, stream: Backlog, code: int, outcome: Outcome, now_ns: int) -> None:
        """A stream has ended: `code` is 0, or an error's."""
        usage = outcome.usage
        figures = self.of(stream.model)
        figures.generation_tokens += stream.completion_tokens
        if usage is not None:
            figures.prompt_tokens += usage.prompt_tokens
            figures.cached_tokens += usage.cached_tokens
        if code:
            self.failed(code)
        else:
            figures.completed += 1
            figures.whole_time.observe(now_ns - stream.began_ns)
            gaps = stream.end - stream.resumed - 1
            if stream.first_ns and gaps > 0:
                figures.between_tokens.observe((now_ns - stream.first_ns) // gaps, gaps)

    def failed(self, code: int) -> None:
        """A request has ended with an error. Codes that no error of the tree has count as its root's."""
        code = code if code in BY_CODE else FabricError.code
        self.failures[code] = self.failures.get(code, 0) + 1
