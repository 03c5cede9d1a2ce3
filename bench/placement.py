"""Caches of prefixes on paper: the fabric's own policies and index, and engines that keep the blocks they used last.

An engine computes prompts one after the other and only what it has not cached, and decodes every request at one pace. Nothing
here keeps time but the trace: a run is a function of it and a seed, and its figures do not depend on the machine.
"""

from __future__ import annotations

import heapq
import json
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from bench.traces import DECODE
from zfabric.core.controller.candidates import Candidates, Host
from zfabric.core.controller.dispatch import Ask, find_policy
from zfabric.core.controller.prefixes import PrefixIndex
from zfabric.limits import PREFIX_BLOCKS_MAX

#: Tokens a second of one engine's prefill.
PREFILL: Final = 8_000.0
SLOTS: Final = 64


@dataclass(frozen=True)
class Turn:
    """One request: seconds from the trace's start, the hashes of its prompt's blocks, tokens of the answer, and which chat it
    belongs to, 0 where the trace does not say.
    """

    at_s: float
    blocks: Sequence[int]
    answer_tokens: int
    chat: int = 0


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival, and how many tokens a block has."""

    turns: Sequence[Turn]
    block_tokens: int

    def faster(self, times: float) -> Trace:
        """The same requests, each at so many times the speed."""
        return Trace([replace(turn, at_s=turn.at_s / times) for turn in self.turns], self.block_tokens)


@dataclass(frozen=True)
class Cluster:
    """Engines that are alike: how many, and tokens that each can keep cached."""

    engines: int
    cached_tokens: int


@dataclass(frozen=True)
class Outcome:
    """How a trace went.

    Attributes:
        hit_rate: Share of all prompts' tokens that were cached where they ran.
        ttft_p50_s, ttft_p99_s: From arrival to the first token.
        spread: The most loaded engine's share of all requests, over the mean share.
    """

    hit_rate: float
    ttft_p50_s: float
    ttft_p99_s: float
    spread: float


def read(path: Path) -> Trace:
    """A trace with ``hash_ids`` as Mooncake publishes them: JSON lines, blocks of 512 tokens.

    Raises:
        ValueError: It has none.
    """
    turns = []
    for line in path.read_text().splitlines() if path.suffix == ".jsonl" else ():
        row = json.loads(line)
        if "hash_ids" not in row:
            break
        # The last block is rarely a full one, and only full ones are hashed.
        blocks = row["hash_ids"][: row["input_length"] // 512]
        turns.append(Turn(row["timestamp"] / 1_000, blocks, row["output_length"]))
    if not turns:
        raise ValueError(f"{path} does not say what prompts share: it has no hash_ids")
    return Trace(turns, 512)


def conversations(
    count: int = 400, *, prompts: int = 4, turns: float = 6.0, rate: float = 1.0, think_s: float = 15.0, seed: int = 1
) -> Trace:
    """Chats of several turns. Each begins with one of a few system prompts of 1,024 tokens, and each turn's prompt is all that
    was said before and 64 … 511 tokens more.

    Args:
        count, rate: How many begin, and how many of them a second.
        turns: Mean turns of each, geometric.
        think_s: Mean time from an answer to the next question, exponential.
    """
    rng, block_tokens = random.Random(seed), 16
    found: list[Turn] = []
    fresh = iter(range(10**6, 10**9))
    systems = [[next(fresh) for _ in range(1_024 // block_tokens)] for _ in range(prompts)]
    begins_s = 0.0
    for chat in range(1, count + 1):
        begins_s += rng.expovariate(rate)
        now, said = begins_s, list(rng.choice(systems))
        while True:
            said.extend(next(fresh) for _ in range(rng.randrange(64, 512) // block_tokens))
            answer = rng.randrange(32, 512)
            found.append(Turn(now, tuple(said), answer, chat))
            if rng.random() < 1 / turns:
                break
            said.extend(next(fresh) for _ in range(answer // block_tokens))
            now += answer / DECODE + rng.expovariate(1 / think_s)
    return Trace(sorted(found, key=lambda turn: turn.at_s), block_tokens)


class Cache:
    """Blocks that an engine has, those used last. `evicted` is told of each that goes."""

    def __init__(self, blocks_max: int, evicted: Callable[[int], None] = lambda block: None) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._blocks_max = blocks_max
        self._evicted = evicted

    def use(self, blocks: Sequence[int]) -> int:
        """A prompt is computed. Returns how many of its first blocks were there."""
        hit = next((place for place, block in enumerate(blocks) if block not in self._blocks), len(blocks))
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._blocks_max:
            self._evicted(self._blocks.popitem(last=False)[0])
        return hit


class _Engine(Host):
    __slots__ = ("cache", "prefilled_s", "served")

    def __init__(self, number: int, blocks_max: int, index: PrefixIndex[Host], *, told: bool) -> None:
        super().__init__(f"w{number}", 1.0, SLOTS)
        self.cache = Cache(blocks_max, (lambda block: index.removed(self, (block,))) if told else lambda block: None)
        #: When all prompts that it has are computed.
        self.prefilled_s = 0.0
        self.served = 0


def most_cached(ask: Ask) -> Host:
    """Whoever has most of the prompt, whatever its load: what hits there are to be had without moving anything."""
    cached = ask.matched()
    return max(ask.candidates, key=lambda host: (cached.get(host, 0), -host.load, ask.rng.random()))


def one_cache(trace: Trace, cluster: Cluster) -> float:
    """The hit rate of one cache as large as all together: no placement has more hits, but for luck with what goes first."""
    cache = Cache(cluster.engines * cluster.cached_tokens // trace.block_tokens)
    return sum(cache.use(turn.blocks) for turn in trace.turns) / sum(len(turn.blocks) for turn in trace.turns)


def play(trace: Trace, cluster: Cluster, policy: str, *, told: bool = False, seed: int = 1) -> Outcome:
    """Run a trace.

    Args:
        policy: A dispatch policy, or "most_cached".
        told: The index hears of blocks that engines throw away; else it knows only what it sent where.
    """
    rng, choose = random.Random(seed), most_cached if policy == "most_cached" else find_policy(policy)
    index: PrefixIndex[Host] = PrefixIndex()
    blocks_max = cluster.cached_tokens // trace.block_tokens
    engines = [_Engine(number, blocks_max, index, told=told) for number in range(cluster.engines)]
    candidates = Candidates()
    for engine in engines:
        candidates.add(engine, rng)
    ends: list[tuple[float, int, _Engine]] = []
    waiting: deque[Turn] = deque()
    ttfts: list[float] = []
    hits = 0

    def give(turn: Turn, now: float) -> bool:
        nonlocal hits
        if not len(candidates):
            return False
        hints = turn.blocks[:PREFIX_BLOCKS_MAX]
        matched = partial(index.matched, hints)
        chosen = choose(Ask(candidates, rng, blocks=len(hints), block_size=trace.block_tokens, matched=matched))
        assert isinstance(chosen, _Engine)
        index.stored(chosen, hints)
        hit = chosen.cache.use(turn.blocks)
        hits += hit
        fresh = (len(turn.blocks) - hit) * trace.block_tokens
        chosen.prefilled_s = max(now, chosen.prefilled_s) + fresh / PREFILL
        first_s = chosen.prefilled_s + 1 / DECODE
        ttfts.append(first_s - turn.at_s)
        chosen.served += 1
        chosen.line.length += 1
        heapq.heappush(ends, (first_s + turn.answer_tokens / DECODE, len(ttfts), chosen))
        if chosen.load >= SLOTS:
            candidates.remove(chosen)
        else:
            candidates.changed(chosen, rng)
        return True

    def finish() -> None:
        now, _, engine = heapq.heappop(ends)
        engine.line.length -= 1
        candidates.add(engine, rng)
        while waiting and give(waiting[0], now):
            waiting.popleft()

    for turn in trace.turns:
        while ends and ends[0][0] <= turn.at_s:
            finish()
        if waiting or not give(turn, turn.at_s):
            waiting.append(turn)
    while ends:
        finish()
    ttfts.sort()
    served = [engine.served for engine in engines]
    return Outcome(
        hits / sum(len(turn.blocks) for turn in trace.turns),
        ttfts[len(ttfts) // 2],
        ttfts[len(ttfts) * 99 // 100],
        max(served) * len(served) / sum(served),
    )
