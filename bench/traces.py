"""Arrival traces: read from the forms that are published or from a flight recording, or generated with stated parameters."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from zfabric.recording.arrivals import RecordedRequest, requests_of
from zfabric.recording.reader import is_recording, read_recordings

#: The trace that is shipped, made by `generate` with its defaults.
SHIPPED: Final = Path(__file__).parent / "data" / "generated.jsonl"
#: Tokens a second of one stream's decoding, at speed 1, wherever answers have tokens and no engine.
DECODE: Final = 50.0
#: What a token of text is taken to have, where only the size of a request is known.
_TOKEN_BYTES: Final = 4


@dataclass(frozen=True)
class Arrival:
    """One request: seconds from the trace's start, tokens of the prompt, tokens of the answer."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int


def read(path: Path) -> list[Arrival]:
    """A trace, from the first arrival on.

    JSON lines with ``timestamp`` (ms), ``input_length`` and ``output_length`` (Mooncake); or CSV with the columns
    ``TIMESTAMP, ContextTokens, GeneratedTokens`` (Azure) or ``Timestamp, Request tokens, Response tokens`` (BurstGPT); or what
    `zfabric-controller --record` has written: prompts have a token for each four bytes then, and answers as many as one stream
    decodes in the time that they took.

    Raises:
        ValueError: None of these forms.
    """
    if is_recording(path):
        found = [_recorded(request) for request in requests_of(read_recordings([path]).events)]
    else:
        found = list(_lines(path) if path.suffix == ".jsonl" else _table(path))
    if not found:
        raise ValueError(f"{path} holds no request")
    found.sort(key=lambda arrival: arrival.at_s)
    start = found[0].at_s
    return [Arrival(arrival.at_s - start, arrival.prompt_tokens, arrival.answer_tokens) for arrival in found]


def _recorded(request: RecordedRequest) -> Arrival:
    prompt_tokens = request.prompt_tokens or max(1, request.bytes // _TOKEN_BYTES)
    return Arrival(
        request.submitted_ns / 1e9, prompt_tokens, request.units or max(1, round(request.running_s * DECODE))
    )


def _lines(path: Path) -> Iterator[Arrival]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            yield Arrival(entry["timestamp"] / 1_000, entry["input_length"], entry["output_length"])


def _table(path: Path) -> Iterator[Arrival]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
            for row in reader:
                # Seven digits of a second are one more than Python reads.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                yield Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        elif {"Timestamp", "Request tokens", "Response tokens"} <= columns:
            for row in reader:
                yield Arrival(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))
        else:
            raise ValueError(f"{path} has the columns {', '.join(sorted(columns))}, which is no known form of a trace")


def generate(count: int = 2_000, seed: int = 7, mean_gap_s: float = 0.2, burstiness: float = 4.0) -> list[Arrival]:
    """Gamma-distributed gaps with a squared coefficient of variation of `burstiness`; log-normal prompts (median 600,
    sigma 1.1) and answers (median 150, sigma 1.0), at most 16,000 and 4,000 tokens."""
    rng = random.Random(seed)
    arrivals, at = [], 0.0
    for _ in range(count):
        at += rng.gammavariate(1 / burstiness, mean_gap_s * burstiness)
        prompt = min(16_000, max(1, round(rng.lognormvariate(6.4, 1.1))))
        answer = min(4_000, max(1, round(rng.lognormvariate(5.0, 1.0))))
        arrivals.append(Arrival(at, prompt, answer))
    return arrivals


def write(path: Path, arrivals: list[Arrival]) -> None:
    """Write a trace as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for arrival in arrivals:
            entry = {
                "timestamp": round(arrival.at_s * 1_000),
                "input_length": arrival.prompt_tokens,
                "output_length": arrival.answer_tokens,
            }
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    write(SHIPPED, generate())
