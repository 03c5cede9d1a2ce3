"""Speculative decoding of the worker with and without, as JSON: ``python -m bench.engines.transformers_speculation``.

SmolLM2-135M-Instruct, greedy, by chat: ``repeats`` asks it to repeat a text, so that answers are there to be found in their
prompts, and ``free`` asks for a story, where little can be guessed. In each round the worker without speculation and the one
with it answer the same requests in turns; told are the medians of their rates, the median, least and greatest of the rounds'
ratios, how many drafts were right, and how many answers are the same: all of them, but for what a pass of another shape rounds
otherwise.

``--assistant PATH`` measures an assistant besides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.engines.transformers import Timed
from bench.engines.transformers_cache import started
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.models.wheels import prepare
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

STREAMS: Final = (1, 4)
TEXT: Final = (
    "The ferry leaves the northern harbour at seven in the morning and calls at four islands before noon. Tickets are sold "
    "on board, and bicycles travel free of charge. In winter the ship waits for the mail train, which may be late when snow "
    "lies on the pass. Whoever wants to return the same day has to take the evening boat from the lighthouse."
)
ASKED: Final = {
    "repeats": f"Repeat the following text word for word, and nothing else.\n\n{TEXT}",
    "free": "Tell a long story of a fisherman who finds a letter in a bottle.",
}
#: So that streams differ.
NAMES: Final = ("Anna", "Boris", "Clara", "David")


async def answered(worker: ModelWorker, answers: Timed, kind: str, streams: int, count: int, number: int) -> float:
    """Seconds that so many streams take from their first tokens on, which come in one pass, to their last."""
    names = [f"{kind} {streams} {number} {stream}" for stream in range(streams)]
    for name, person in zip(names, NAMES, strict=False):
        asked = [{"role": "user", "content": f"My name is {person}. {ASKED[kind]}"}]
        sampling = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)
        worker.begin(GenerateRequest(messages=asked, request_id=name, sampling=sampling))
    await answers.until(*names, tokens=1)
    began = time.perf_counter()
    await answers.until(*names)
    return time.perf_counter() - began


def counted(worker: ModelWorker) -> tuple[float, float]:
    """Drafted and accepted so far."""
    gauges = worker.load_report().gauges
    return gauges.get("draft_tokens", 0), gauges.get("accepted_draft_tokens", 0)


async def compared(
    workers: dict[str, tuple[ModelWorker, Timed]], kind: str, streams: int, given: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of all in turns."""
    rates: dict[str, list[float]] = {way: [] for way in workers}
    before = {way: counted(worker) for way, (worker, _) in workers.items()}
    # A round that is not counted: it fills the cache with the prompts.
    for number in range(-1, given.rounds):
        for way, (worker, answers) in list(workers.items())[:: 1 if number % 2 else -1]:
            print(f"{kind}, {streams} streams, round {number + 1}, {way}", file=sys.stderr, flush=True)
            count = given.tokens if number >= 0 else 2
            seconds = await answered(worker, answers, kind, streams, count, number)
            if number >= 0:
                rates[way].append(streams * (count - 1) / seconds)
    found: dict[str, Any] = {"none": {"tokens_per_s": round(statistics.median(rates["none"]), 2)}}
    for way in list(workers)[1:]:
        drafted, accepted = (now - then for now, then in zip(counted(workers[way][0]), before[way], strict=True))
        ratios = [with_it / without for with_it, without in zip(rates[way], rates["none"], strict=True)]
        found[way] = {
            "tokens_per_s": round(statistics.median(rates[way]), 2),
            "ratio": [round(one, 2) for one in (statistics.median(ratios), min(ratios), max(ratios))],
            "alike": _alike(workers, way),
            "drafted": int(drafted),
            "accepted": round(accepted / max(drafted, 1), 3),
        }
    return found


def _alike(workers: dict[str, tuple[ModelWorker, Timed]], way: str) -> float:
    """Answers so far whose tokens are those without speculation, as a share."""
    without, with_it = workers["none"][1], workers[way][1]
    return round(statistics.mean(without.tokens(name) == with_it.tokens(name) for name in without.deltas), 3)


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    directory = prepare("smollm2")
    chosen: dict[str, dict[str, Any]] = {"none": {}, "ngram": {"speculation": "ngram"}}
    if given.assistant:
        chosen["assistant"] = {"speculation": "assistant", "assistant": given.assistant}
    workers = {
        way: await started(directory, "paged", given.dtype, num_speculative_tokens=given.num_speculative_tokens, **its)
        for way, its in chosen.items()
    }
    found = {
        f"{kind}_{streams}": await compared(workers, kind, streams, given)
        for kind in ASKED
        for streams in given.streams
    }
    for worker, _ in workers.values():
        await worker.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=72, help="of each answer")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--assistant", help="directory of an assistant, to be measured as well")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    found = asyncio.run(measure(given))
    load = [round(one, 2) for one in os.getloadavg()]
    print(json.dumps({"dtype": given.dtype, "threads": given.threads, "load_average": load, **found}, indent=1))


if __name__ == "__main__":
    main()
