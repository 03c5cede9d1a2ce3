"""ModelWorker's figures, as JSON: ``python -m bench.engines.transformers [--models tiny smollm2] [--threads 1]``.

- ``throughput``: tokens per second of so many answers at once, of transformers' own ``generate`` one by one, of its own
  continuous batching, and with ``--vllm`` of vLLM.
- ``results``: tokens per second and time to the first token by streams, of the worker alone and through the fabric.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from bench.engines import answers as answers_of
from bench.engines import transformers_fabric
from bench.engines.answers import in_turn, summary, told
from bench.engines.runs import Run, results
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
PROMPT_TOKENS = 24
LONG_TOKENS = 2_000
#: Tokens of an answer: enough that joining and leaving weigh little, few enough for a CPU.
ANSWER_TOKENS = {"tiny": 256, "smollm2": 48}
#: The same where many are made at once.
MANY_TOKENS = {"tiny": 128, "smollm2": 16}
GAP_TOKENS = {"tiny": 1_000, "smollm2": 96}
LONG_PROMPTS = 2
PAIRS = {"tiny": 5, "smollm2": 2}
ROUNDS = {"tiny": 7, "smollm2": 2}
FABRIC_TOKENS = {"tiny": 3_000, "smollm2": 64}
DRIVER_ROUNDS = {"tiny": 5, "smollm2": 3}
DRIVER_TOKENS = {"tiny": 1_000, "smollm2": 64}


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


def one_by_one(model: Any, count: int) -> float:
    """Tokens per second of transformers' own generate."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with torch.inference_mode():
        model.generate(torch.tensor([prompt(0, PROMPT_TOKENS)]), max_new_tokens=4, **options)
        began = time.perf_counter()
        for seed in range(STREAMS):
            model.generate(torch.tensor([prompt(seed, PROMPT_TOKENS)]), max_new_tokens=count, **options)
    return STREAMS * count / (time.perf_counter() - began)


def continuous(model: Any, count: int) -> float:
    """Tokens per second of transformers' own continuous batching, its set-up not counted."""
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=2)
    # Without a bound it takes most of the machine's memory.
    shape = ContinuousBatchingConfig(page_size=32, num_blocks=256, max_batch_tokens=512)
    manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=shape)
    manager.start()
    try:
        for run in range(2):
            began = time.perf_counter()
            for seed in range(STREAMS):
                manager.add_request(prompt(seed, PROMPT_TOKENS), request_id=f"{run} {seed}", max_new_tokens=count)
            done = 0
            while done < STREAMS:
                result = manager.get_result(timeout=60)
                done += result is not None and result.is_finished()
            seconds = time.perf_counter() - began
    finally:
        manager.stop(block=True, timeout=10)
    return STREAMS * count / seconds


def vllm(directory: Path, dtype: str, count: int) -> dict[str, float]:
    """Tokens per second of vLLM's own engine by streams, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "bench.engines.transformers_vllm",
        str(directory),
        dtype,
        str(count),
        "1",
        str(STREAMS),
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rates: dict[str, float] = json.loads(output.splitlines()[-1])
    return rates


async def through_fabric(
    name: str, directory: Path, worker: ModelWorker, answers: Timed, given: argparse.Namespace
) -> tuple[dict[str, Any], dict[tuple[str, int], list[Run]]]:
    """Answers of a worker as its clients see them, in turn with those of the one in this process, which is then closed."""
    arguments = ["--dtype", given.dtype, "--device", "cpu", "--threads", str(given.threads)]
    arguments += ["--compile"] if given.compile else []
    counts = {1: ANSWER_TOKENS[name], STREAMS: ANSWER_TOKENS[name], MANY: MANY_TOKENS[name]}
    runs: dict[tuple[str, int], list[Run]] = {}
    async with transformers_fabric.served(directory, *arguments, transport=given.transport[0]) as client:
        await answers_of.together(client, prompt, 8, STREAMS)
        for number in range(PAIRS[name]):
            say(f"{name}, through the fabric and alone, round {number + 1}")
            for streams, count in counts.items():
                alone = await together(worker, answers, count, streams, ROUNDS[name] + number)
                through = await answers_of.together(client, prompt, count, streams)
                runs.setdefault(("worker", streams), []).append(alone)
                runs.setdefault(("fabric", streams), []).append(through)
        await worker.close()
        say(f"{name}, answers through the fabric")
        times = await answers_of.measure(client, FABRIC_TOKENS[name], prompt)
    return told(times), runs


async def drivers(name: str, directory: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Answers of a worker by driver."""
    arguments = ["--dtype", given.dtype, "--device", "cpu", "--threads", str(given.threads)]
    async with contextlib.AsyncExitStack() as stack:
        clients: dict[Transport, AsyncClient] = {}
        for transport in given.transport:
            served = transformers_fabric.served(directory, *arguments, transport=transport)
            clients[transport] = await stack.enter_async_context(served)
        say(f"{name}, answers by driver")
        return await in_turn(clients, DRIVER_ROUNDS[name], DRIVER_TOKENS[name], prompt)


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


async def together(worker: ModelWorker, answers: Timed, count: int, streams: int, run: int = 0) -> Run:
    """So many requests at once."""
    names = [f"together {run} {streams} {index}" for index in range(streams)]
    began = time.perf_counter()
    for seed, name in enumerate(names):
        worker.begin(request(name, seed, PROMPT_TOKENS, count))
    await answers.until(*names)
    rate = streams * count / (time.perf_counter() - began)
    return Run(rate, statistics.median(answers.times[name][0] - began for name in names) * 1_000)


async def gaps(worker: ModelWorker, answers: Timed, count: int) -> dict[str, Any]:
    """Gaps of half the streams, undisturbed and while long prompts arrive."""
    found: dict[str, Any] = {}
    for case in ("undisturbed", "disturbed"):
        names = [f"{case} {index}" for index in range(STREAMS // 2)]
        for seed, name in enumerate(names):
            worker.begin(request(name, seed, PROMPT_TOKENS, count))
        await answers.until(*names, tokens=4)
        begin, end = time.perf_counter(), float("inf")
        if case == "disturbed":
            long = [f"long {index}" for index in range(LONG_PROMPTS)]
            for seed, name in enumerate(long):
                worker.begin(request(name, seed, LONG_TOKENS, 1))
                await answers.until(name)
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


async def throughput(
    name: str, directory: Path, worker: ModelWorker, answers: Timed, given: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of all systems."""
    count = ANSWER_TOKENS[name]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, given.dtype)).eval()
    say(f"{name}, continuous batching of transformers")
    own = continuous(model, count)
    theirs = vllm(directory, given.dtype, count) if given.vllm else {}
    await together(worker, answers, 8, STREAMS, -1)
    alone: list[float] = []
    runs: dict[int, list[Run]] = {1: [], STREAMS: []}
    for number in range(ROUNDS[name]):
        say(f"{name}, round {number + 1}: one by one, 1 and {STREAMS} streams")
        alone.append(one_by_one(model, count))
        for streams, found in runs.items():
            found.append(await together(worker, answers, count, streams, number))
    gains = [many.tokens_per_second / one for one, many in zip(alone, runs[STREAMS], strict=True)]
    single, eight = (
        round(statistics.median(run.tokens_per_second for run in runs[streams]), 1) for streams in (1, STREAMS)
    )
    return {
        "generate_one_by_one_tokens_per_s": round(statistics.median(alone), 1),
        "continuous_batching_of_transformers_8_tokens_per_s": round(own, 1),
        **{f"vllm_{streams}_tokens_per_s": rate for streams, rate in theirs.items()},
        "worker_1_stream_tokens_per_s": single,
        "worker_8_streams_tokens_per_s": eight,
        "gain_at_8": round(statistics.median(gains), 2),
        "gain_at_8_least": round(min(gains), 2),
        "gain_at_8_rounds": [round(gain, 3) for gain in gains],
    }


async def measure(name: str, directory: Path, given: argparse.Namespace) -> dict[str, Any]:
    options = TransformersOptions(
        model=str(directory), dtype=given.dtype, device="cpu", context_length=4_096, compile=given.compile
    )
    worker = ModelWorker(options)
    worker.steps = answers = Timed()
    await worker.load()
    rates = await throughput(name, directory, worker, answers, given)
    say(f"{name}, gaps and answers")
    found: dict[str, Any] = {
        "throughput": rates,
        "gaps_ms": await gaps(worker, answers, GAP_TOKENS[name]),
        "answers_ms": await loop_answers(worker, answers, ANSWER_TOKENS[name]),
    }
    found["fabric_ms"], runs = await through_fabric(name, directory, worker, answers, given)
    found["results"] = results(runs)
    if len(given.transport) > 1:
        found["drivers_ms"] = await drivers(name, directory, given)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(ANSWER_TOKENS), default=sorted(ANSWER_TOKENS))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--transport", nargs="+", choices=TRANSPORTS, default=[choose(None)], help="drivers; the first is the fabric's"
    )
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
        "compile": given.compile,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps({"engine": "transformers", "conditions": conditions, "models": models}, indent=2))


if __name__ == "__main__":
    main()
