"""ModelWorker's figures, as JSON: ``python -m bench.engines.transformers [--models tiny smollm2] [--threads 1]``.

- ``throughput``: tokens per second of so many answers at once, of transformers' own ``generate`` one by one, of its own
  continuous batching, and with ``--vllm`` of vLLM. Prompts are new in each round.
- ``results``: tokens per second and time to the first token by streams, of the worker alone and through the fabric.
- ``steps``: a step by streams, against the memory's bandwidth, and the host's share of it, see
  `bench.engines.transformers_bound`.
- ``gaps``: time between two tokens of running streams, undisturbed, and while prompts of 2,000 tokens arrive.
- ``answers``: how late the event loop's timers are while the model computes (a beat is such a timer), and how long a
  status report, a cancel and the handing over of a step take on it.
- ``fabric``: the same through a controller and a worker as processes, see `bench.engines.transformers_fabric`;
  and ``drivers``, with several of ``--transport``, the same on each of them, in turns.

All but the last in one process, as a worker has it; times in milliseconds. The tiny model is random, so it shows the cost
of the engine alone; SmolLM2-135M-Instruct shows what a real one leaves of that. Greedy, ends ignored. Rates are medians of
rounds in which the systems of this process take turns, and the gain is that of each round: the machine may be shared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM

from bench.engines import answers as answers_of
from bench.engines import transformers_bound, transformers_fabric
from bench.engines.answers import in_turn, summary, told
from bench.engines.runs import Run, results
from bench.engines.transformers_peers import VLLM, continuous, one_by_one
from tests.backends.tiny import Answers, save_llama
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.models.wheels import prepare
from zfabric.transport.links import TRANSPORTS, Transport, choose
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.sampling import SamplingParams

STREAMS = 8
MANY = 64
#: Streams whose rates are shown.
SHOWN = (1, STREAMS, 32)
#: The number of a run that no round has.
WARM_UP = 999
PROMPT_TOKENS = 24
LONG_TOKENS = 2_000
LONG_PROMPTS = 2
#: Of the worker's cache on a device: enough for all of it, and something is left for the others.
DEVICE_TOKENS = 131_072
DEVICE_STREAMS = 256


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        answer: Tokens of an answer: enough that joining and leaving weigh little, few enough for a CPU.
        many: The same where many are made at once.
        gap: And where gaps are measured.
        fabric: And where a worker is asked how soon it answers.
        driver: And on each driver.
        rounds: In which the systems of this process take turns.
        pairs: In which the worker and the fabric do.
        driver_rounds: In which drivers do.
    """

    answer: int
    many: int
    gap: int
    fabric: int
    driver: int
    rounds: int
    pairs: int
    driver_rounds: int


SIZES = {
    "tiny": Size(answer=256, many=128, gap=1_000, fabric=3_000, driver=1_000, rounds=7, pairs=5, driver_rounds=5),
    "smollm2": Size(answer=48, many=16, gap=96, fabric=64, driver=64, rounds=3, pairs=2, driver_rounds=3),
}
#: For a device, to which the real model is no work.
DEVICE_SIZES = {**SIZES, "smollm2": replace(SIZES["tiny"], rounds=5, pairs=3)}


def size_of(name: str, given: argparse.Namespace) -> Size:
    """How much is measured of a model; a round of each for a look whether all of it runs."""
    size = (SIZES if given.device == "cpu" else DEVICE_SIZES)[name]
    return replace(size, answer=16, many=4, rounds=1, pairs=1, driver_rounds=1) if given.quick else size


class Timed(Answers):
    """Notes when the tokens of each request came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[float]] = {}
        self.emits: list[float] = []

    def emit(self, step: Iterable[tuple[str, Delta]]) -> None:
        lines = list(step)
        now = time.perf_counter()
        for request_id, _ in lines:
            self.times.setdefault(request_id, []).append(now)
        super().emit(lines)
        self.emits.append(time.perf_counter() - now)

    def gaps(self, names: Sequence[str], begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Times between two tokens that both came in the span, of these requests."""
        found = []
        for name in names:
            inside = [at for at in self.times[name] if begin <= at <= end]
            found += [later - earlier for earlier, later in itertools.pairwise(inside)]
        return found


def prompt(seed: int, length: int) -> list[int]:
    """Random tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(10, 250, (length,), generator=generator)]


def request(name: str, seed: int, length: int, count: int) -> GenerateRequest:
    sampling = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)
    return GenerateRequest(prompt_token_ids=prompt(seed, length), request_id=name, sampling=sampling)


async def through_fabric(
    name: str, directory: Path, worker: ModelWorker, answers: Timed, given: argparse.Namespace, size: Size
) -> tuple[dict[str, Any], dict[tuple[str, int], list[Run]]]:
    """Answers of a worker as its clients see them, in turn with those of the one in this process, which is then closed."""
    arguments = served_with(given)
    arguments += ["--compile"] if given.compile else []
    counts = {1: size.answer, STREAMS: size.answer, MANY: size.many}
    runs: dict[tuple[str, int], list[Run]] = {}
    async with transformers_fabric.served(directory, *arguments, transport=given.transport[0]) as client:
        await answers_of.together(client, prompt, 8, STREAMS, size.pairs)
        for number in range(size.pairs):
            say(f"{name}, through the fabric and alone, round {number + 1}")
            for streams, count in counts.items():
                alone = await together(worker, answers, count, streams, size.rounds + number)
                through = await answers_of.together(client, prompt, count, streams, number)
                runs.setdefault(("worker", streams), []).append(alone)
                runs.setdefault(("fabric", streams), []).append(through)
        await worker.close()
        say(f"{name}, answers through the fabric")
        times = await answers_of.measure(client, size.fabric, prompt)
    return told(times), runs


async def drivers(name: str, directory: Path, given: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Answers of a worker by driver."""
    arguments = served_with(given)
    async with contextlib.AsyncExitStack() as stack:
        clients: dict[Transport, AsyncClient] = {}
        for transport in given.transport:
            served = transformers_fabric.served(directory, *arguments, transport=transport)
            clients[transport] = await stack.enter_async_context(served)
        say(f"{name}, answers by driver")
        return await in_turn(clients, size.driver_rounds, size.driver, prompt)


def served_with(given: argparse.Namespace) -> list[str]:
    """Arguments of a worker that is a process."""
    arguments = ["--dtype", given.dtype, "--device", given.device, "--threads", str(given.threads)]
    return arguments if given.device == "cpu" else [*arguments, "--kv-tokens-max", str(DEVICE_TOKENS)]


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


async def together(worker: ModelWorker, answers: Timed, count: int, streams: int, run: int = 0) -> Run:
    """So many requests at once."""
    names = [f"together {run} {streams} {index}" for index in range(streams)]
    began = time.perf_counter()
    for seed, name in zip(answers_of.seeds(run, streams), names, strict=True):
        worker.begin(request(name, seed, PROMPT_TOKENS, count))
    await answers.until(*names)
    rate = streams * count / (time.perf_counter() - began)
    return Run(rate, statistics.median(answers.times[name][0] - began for name in names) * 1_000)


async def gaps(worker: ModelWorker, answers: Timed, count: int) -> dict[str, Any]:
    """Gaps of half the streams, undisturbed and while long prompts arrive."""
    found: dict[str, Any] = {}
    # Made beforehand: what the event loop does meanwhile would be counted as gaps.
    long = [request(f"long {index}", index, LONG_TOKENS, 1) for index in range(LONG_PROMPTS)]
    for case in ("undisturbed", "disturbed"):
        names = [f"{case} {index}" for index in range(STREAMS // 2)]
        for seed, name in enumerate(names):
            worker.begin(request(name, seed, PROMPT_TOKENS, count))
        await answers.until(*names, tokens=4)
        begin, end = time.perf_counter(), float("inf")
        if case == "disturbed":
            for one in long:
                worker.begin(one)
                await answers.until(one.request_id)
            end = time.perf_counter()
            found["long_prompts_ms"] = round((end - begin) * 1_000 / LONG_PROMPTS, 1)
        await answers.until(*names)
        found[case] = summary(answers.gaps(names, begin, end))
    return found


async def loop_answers(worker: ModelWorker, answers: Timed, count: int) -> dict[str, Any]:
    """How the event loop does while the batch is full."""
    names = [f"busy {index}" for index in range(STREAMS)]
    for seed, name in enumerate(names):
        worker.begin(request(name, seed, PROMPT_TOKENS, count))
    await answers.until(*names, tokens=2)
    answers.emits.clear()
    timers, reports, cancels = [], [], []
    number = 0
    while not all(answers.ended(name) for name in names):
        due = time.perf_counter() + 0.001
        await asyncio.sleep(0.001)
        began = time.perf_counter()
        timers.append(began - due)
        worker.load_report()
        reported = time.perf_counter()
        reports.append(reported - began)
        worker.begin(request(f"cancelled {number}", number, PROMPT_TOKENS, count))
        begun = time.perf_counter()
        worker.abort(f"cancelled {number}")
        cancels.append(time.perf_counter() - begun)
        number += 1
    return {
        "timer_lateness": summary(timers),
        "status_report": summary(reports),
        "cancel": summary(cancels),
        "step_handed_over": summary(answers.emits),
    }


def tried(measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """What another system does; one that fails costs nobody else's figures, and says why."""
    try:
        return {name: round(rate, 1) for name, rate in measure().items()}
    except Exception as error:  # noqa: BLE001 — whatever is installed there
        say(f"{type(error).__name__}: {error}")
        return {"failed": f"{type(error).__name__}: {error}"}


async def throughput(
    name: str, directory: Path, worker: ModelWorker, answers: Timed, given: argparse.Namespace, size: Size
) -> dict[str, Any]:
    """Tokens per second of all systems."""
    count = size.answer
    prompts = [prompt(seed, PROMPT_TOKENS) for seed in range(STREAMS)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, given.dtype)).eval().to(given.device)
    say(f"{name}, continuous batching of transformers")
    own = tried(lambda: {"continuous_batching_of_transformers_8_tokens_per_s": continuous(model, prompts, count)})
    await together(worker, answers, 8, STREAMS, WARM_UP)
    with contextlib.ExitStack() as stack:
        beside = await asyncio.to_thread(vllm, name, directory, given, stack) if given.vllm else None
        alone: list[float] = []
        runs: dict[int, list[float]] = {streams: [] for streams in SHOWN}
        theirs: dict[int, list[float]] = {streams: [] for streams in SHOWN}
        for number in range(size.rounds):
            say(f"{name}, round {number + 1}: one by one, and {', '.join(map(str, SHOWN))} streams")
            alone.append(one_by_one(model, prompts, count))
            for streams in SHOWN:
                runs[streams].append((await together(worker, answers, count, streams, number)).tokens_per_second)
                if beside is not None:
                    theirs[streams].append(await asyncio.to_thread(beside.rate, count, streams))
    gains = ratios(runs[STREAMS], alone)
    found: dict[str, Any] = {
        "generate_one_by_one_tokens_per_s": round(statistics.median(alone), 1),
        **own,
        "gain_at_8": round(statistics.median(gains), 2),
        "gain_at_8_least": round(min(gains), 2),
        "gain_at_8_rounds": gains,
        **({"vllm": "failed"} if given.vllm and beside is None else {}),
    }
    for streams in SHOWN:
        word = "stream" if streams == 1 else "streams"
        found[f"worker_{streams}_{word}_tokens_per_s"] = round(statistics.median(runs[streams]), 1)
        if beside is not None:
            found[f"vllm_{streams}_tokens_per_s"] = round(statistics.median(theirs[streams]), 1)
            found[f"of_vllm_at_{streams}_rounds"] = of_vllm = ratios(runs[streams], theirs[streams])
            found[f"of_vllm_at_{streams}"] = round(statistics.median(of_vllm), 2)
    return found


def vllm(name: str, directory: Path, given: argparse.Namespace, stack: contextlib.ExitStack) -> VLLM | None:
    """vLLM's engine, warm; None if it does not start, which costs nobody else's figures."""
    say(f"{name}, vLLM")
    try:
        engine = VLLM(directory, given.dtype, device=given.device)
        stack.callback(engine.close)
        for streams in SHOWN:
            engine.rate(8, streams)
    except (OSError, RuntimeError) as error:
        say(str(error))
        return None
    return engine


def ratios(some: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of each round."""
    return [round(one / other, 3) for one, other in zip(some, others, strict=True)]


async def measure(name: str, directory: Path, given: argparse.Namespace) -> dict[str, Any]:
    size = size_of(name, given)
    options = TransformersOptions(
        model=str(directory), dtype=given.dtype, device=given.device, context_length=4_096, compile=given.compile,
        kv_tokens_max=None if given.device == "cpu" else DEVICE_TOKENS,
        max_batch_size=None if given.device == "cpu" else DEVICE_STREAMS,
    )  # fmt: skip
    worker = ModelWorker(options)
    worker.steps = answers = Timed()
    await worker.load()
    rates = await throughput(name, directory, worker, answers, given, size)
    say(f"{name}, steps against the memory's bandwidth")
    assert worker._assembled is not None
    steps = await asyncio.to_thread(
        transformers_bound.measure, worker._assembled.engine, worker._assembled.loaded.model, size.answer
    )
    say(f"{name}, gaps and answers")
    found: dict[str, Any] = {
        "throughput": rates,
        "steps": steps,
        "gaps_ms": await gaps(worker, answers, size.gap),
        "answers_ms": await loop_answers(worker, answers, size.answer),
    }
    found["fabric_ms"], runs = await through_fabric(name, directory, worker, answers, given, size)
    found["results"] = results(runs)
    if len(given.transport) > 1:
        found["drivers_ms"] = await drivers(name, directory, given, size)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--transport", nargs="+", choices=TRANSPORTS, default=[choose(None)], help="drivers; the first is the fabric's"
    )
    parser.add_argument("--device", default="cpu", help="as of the worker, such as cuda")
    parser.add_argument("--quick", action="store_true", help="a round of each with few tokens: whether all of it runs")
    parser.add_argument("--compile", action="store_true", help="the worker's own flag")
    parser.add_argument("--vllm", action="store_true", help="put vLLM's engine beside it, which has to be installed")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="zf-bench-") as root:
        directories = {
            "tiny": lambda: save_llama(Path(root), positions=4_096, heads=2),
            "smollm2": lambda: prepare("smollm2"),
        }
        models = {name: asyncio.run(measure(name, directories[name](), given)) for name in given.models}
    load = statistics.fmean(os.getloadavg())
    conditions = {
        "cpus": os.cpu_count(), "threads": given.threads, "load_average": round(load, 1), "dtype": given.dtype,
        "compile": given.compile, "device": given.device, "quick": given.quick,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps({"engine": "transformers", "conditions": conditions, "models": models}, indent=2))


if __name__ == "__main__":
    main()
