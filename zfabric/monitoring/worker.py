"""A worker's figures as metrics."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Final

from prometheus_client.metrics_core import Metric

from zfabric.core.worker.figures import ModelFigures, WorkerFigures
from zfabric.monitoring.families import counter, errors, gauge, histogram, transport
from zfabric.worker.service import WorkerService

_NO_NAME: Final = re.compile(r"[^a-zA-Z0-9_]")
#: Figures that several engines tell, by the names that they use: what they are called here, and how many of theirs are one.
_KNOWN_LEVELS: Final = {
    "kv_cache_use": ("zfabric_kv_cache_usage_ratio", "How much of the engine's cache is in use, from 0 to 1.", 1.0),
    "step_ms": ("zfabric_engine_step_seconds", "How long the engine's latest step took.", 1e-3),
}
_KNOWN_COUNTS: Final = {
    "prefix_cache_queries": (
        "zfabric_prefix_cache_queries",
        "Tokens of prompts that were looked up in the engine's cache.",
    ),
    "prefix_cache_hits": ("zfabric_prefix_cache_hits", "Tokens of prompts that the engine's cache had."),
    "draft_tokens": ("zfabric_draft_tokens", "Tokens that the engine guessed ahead, by speculative decoding."),
    "accepted_draft_tokens": ("zfabric_accepted_draft_tokens", "Of these, the tokens that were right."),
    "steps": ("zfabric_engine_steps", "Steps of the engine."),
    "preemptions": ("zfabric_engine_preemptions", "Requests that the engine put off in mid-answer."),
}
#: What a beat itself has.
_TOLD: Final = frozenset({"running", "waiting"})


def metrics_of(service: WorkerService) -> Iterator[Metric]:
    """All that a worker tells of itself. Call it on the loop's thread; what it returns may be read on any."""
    load = service.load
    if load is None:
        return iter(())
    figures = service.figures
    return itertools.chain(
        (
            gauge("zfabric_worker_slots", "Requests that this worker takes at a time.", load.slots),
            gauge("zfabric_worker_requests_running", "Requests that this worker's engines have.", load.running),
            gauge("zfabric_worker_requests_waiting", "Requests that its engines hold back.", load.waiting),
            gauge("zfabric_worker_draining", "Whether it takes nothing new.", load.draining),
            counter("zfabric_worker_units", "Deltas that its backends made.", service.units),
            gauge("zfabric_worker_tokens_per_second", "Deltas a second over the last beat.", load.tokens_per_second),
        ),
        _requests(list(figures.models.items())),
        _endings(figures, dict(figures.failures)),
        _engine(dict(load.gauges), load.kv_blocks_free),
        transport(service.counted(), ()),
    )


def _endings(figures: WorkerFigures, failures: dict[int, int]) -> Iterator[Metric]:
    yield errors("zfabric_worker_request_errors", "Requests that ended with an error here, by its class.", failures)
    yield histogram(
        "zfabric_credit_wait_seconds",
        "How long streams that had tokens waited for their readers to allow them.",
        {(): figures.credit_waits},
    )
    yield gauge(
        "zfabric_credit_waiting",
        "Streams that wait for their readers now.",
        figures.credit_waiting - figures.credit_waits.count,
    )


def _requests(models: list[tuple[str, ModelFigures]]) -> Iterator[Metric]:
    for name, meaning, field in (
        (
            "zfabric_time_to_first_token_seconds",
            "From a request's arrival at the worker to its first token.",
            "first_token",
        ),
        (
            "zfabric_inter_token_latency_seconds",
            "From one token to the next: of each answer the mean, as often as it has tokens after the first.",
            "between_tokens",
        ),
        (
            "zfabric_request_inference_time_seconds",
            "From a request's arrival at the worker to its end, for those that completed.",
            "whole_time",
        ),
    ):
        yield histogram(name, meaning, {(label,): getattr(it, field) for label, it in models}, "model")
    for name, meaning, field in (
        ("zfabric_worker_requests_completed", "Requests that completed here.", "completed"),
        ("zfabric_prompt_tokens", "Tokens of prompts, as engines count them.", "prompt_tokens"),
        ("zfabric_cached_prompt_tokens", "Of these, the tokens that a cache had.", "cached_tokens"),
        ("zfabric_generation_tokens", "Tokens of answers, once these have ended.", "generation_tokens"),
    ):
        yield counter(name, meaning, {(label,): getattr(it, field) for label, it in models}, "model")


def _engine(told: dict[str, float], blocks_free: int | None) -> Iterator[Metric]:
    for figure, (name, meaning, unit) in _KNOWN_LEVELS.items():
        yield gauge(name, meaning, {(): told.pop(figure) * unit} if figure in told else {})
    for figure, (name, meaning) in _KNOWN_COUNTS.items():
        yield counter(name, meaning, {(): told.pop(figure)} if figure in told else {})
    free: dict[tuple[str, ...], float] = {} if blocks_free is None else {(): float(blocks_free)}
    yield gauge("zfabric_kv_cache_free_blocks", "Blocks of the engine's cache that are free.", free)
    rest: dict[tuple[str, ...], float] = {
        (_NO_NAME.sub("_", name),): value for name, value in told.items() if name not in _TOLD
    }
    yield gauge("zfabric_engine", "What else engines tell of themselves (docs/backends.md).", rest, "figure")
