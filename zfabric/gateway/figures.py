"""What a gateway counts: once a request, and nothing for a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from zfabric.client.results import Completion
from zfabric.core.histogram import Histogram
from zfabric.limits import MEASURED_MODELS_MAX

#: Paths that are none, and models that nobody serves: callers choose them, and a label must not grow without end.
OTHER: Final = "other"


class Answers:
    """Answers of one model that are made bit by bit.

    Attributes:
        first_token: From the arrival of a request to the first of its answer.
        between_tokens: The mean of each answer, from its first token to its end.
        prompt_tokens, completion_tokens: Of answers that came to their end.
    """

    __slots__ = ("between_tokens", "completion_tokens", "first_token", "prompt_tokens")

    def __init__(self) -> None:
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self.prompt_tokens = 0
        self.completion_tokens = 0


class Figures:
    """All of one process.

    Attributes:
        requests: Those that ended, by path, model and status.
        whole_time: From a request's head to the end of its response, by path.
        answers: By model.
        streams: Streams that are open now.
        disconnects: Callers that went away before they had their answer.
        received_bytes, sent_bytes: Of bodies.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.whole_time: dict[str, Histogram] = {}
        self.answers: dict[str, Answers] = {}
        self.streams = 0
        self.disconnects = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self._models: set[str] = set()

    def ended(self, path: str, model: str, status: int, taken_ns: int) -> None:
        """A request has its response, or never gets one."""
        served = status < 300 or model in self._models
        label = self._label(model) if model and served else OTHER
        self.requests[path, label, status] += 1
        time = self.whole_time.get(path)
        if time is None:
            time = self.whole_time[path] = Histogram()
        time.observe(taken_ns)

    def answered(
        self, model: str, begun_ns: int, first_ns: int, ended_ns: int, completions: Iterable[Completion]
    ) -> None:
        """An answer came to its end."""
        label = self._label(model)
        answers = self.answers.setdefault(label, Answers())
        answers.first_token.observe(first_ns - begun_ns)
        made = 0
        for completion in completions:
            answers.prompt_tokens += completion.usage.prompt_tokens
            made += completion.usage.completion_tokens
        answers.completion_tokens += made
        if made > 1:
            answers.between_tokens.observe((ended_ns - first_ns) // (made - 1))

    def _label(self, model: str) -> str:
        """Call it for models that are served: their number is no caller's to choose."""
        if model not in self._models:
            if len(self._models) >= MEASURED_MODELS_MAX:
                return OTHER
            self._models.add(model)
        return model
