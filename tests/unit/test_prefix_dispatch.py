"""Requests with hashes of their prompts: which worker `prefix_aware` sends them to, and what is counted of it."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import Any

import pytest

from tests.peers import FakeFabric, model
from tests.unit.test_client_session import Wire
from tests.unit.test_controller_metrics import values
from tests.unit.worker_side import WorkerSide
from zfabric.client.requests import generate_request
from zfabric.core.controller.candidates import Candidates, Host
from zfabric.core.controller.dispatch import Ask, prefix_aware
from zfabric.core.controller.prefixes import hashes_of
from zfabric.core.worker.cached import CacheChange
from zfabric.errors import RequestError
from zfabric.ids import milliseconds
from zfabric.limits import (
    PREFIX_BLOCK_TOKENS,
    PREFIX_BLOCKS_MAX,
    PREFIX_HASH_BYTES,
    PREFIX_LOAD_TOKENS,
    PREFIX_TELL_MS,
)
from zfabric.monitoring.controller import broker_metrics
from zfabric.wire import codec, kinds
from zfabric.wire.load import CachedBlocks
from zfabric.wire.prefixes import rendered, text_hashes, token_hashes

#: One live request is worth so many blocks.
_LOAD_BLOCKS = PREFIX_LOAD_TOKENS // PREFIX_BLOCK_TOKENS


def prompt(blocks: int, start: int = 0) -> dict[str, Any]:
    """What a SUBMIT brings of a prompt of so many blocks; those of one `start` are prefixes of each other."""
    tokens = [start] * (blocks * PREFIX_BLOCK_TOKENS)
    return {"prefix": token_hashes(tokens), "prefix_block": PREFIX_BLOCK_TOKENS}


@pytest.fixture
def fabric() -> FakeFabric:
    made = FakeFabric(policy="prefix_aware")
    made.client("alice")
    return made


def where(fabric: FakeFabric, request: int) -> str:
    """The worker that has a request."""
    return next(name for name in fabric.dispatches if request in fabric.taken(name))


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ask_of(loads: dict[Host, int], cached: dict[Host, int], blocks: int) -> Ask:
    candidates, rng = Candidates(), random.Random(1)
    for host, load in loads.items():
        host.line.length = load
        candidates.add(host, rng)
    return Ask(candidates, rng, blocks=blocks, block_size=PREFIX_BLOCK_TOKENS, matched=lambda: cached)


@pytest.mark.parametrize("seed", range(20))
def test_it_chooses_as_a_look_at_every_host_does(seed: int) -> None:
    rng = random.Random(seed)
    hosts = [Host(f"w{number}", rng.choice((0.5, 1.0, 2.0)), 0) for number in range(rng.choice((3, 40)))]
    blocks = rng.randrange(1, PREFIX_BLOCKS_MAX)
    cached = {host: rng.randrange(1, blocks + 1) for host in hosts if rng.random() < 0.5}
    elsewhere = Host("full", 1.0, 0)
    ask = ask_of({host: rng.randrange(12) for host in hosts}, {**cached, elsewhere: blocks}, blocks)

    def cost(host: Host) -> float:
        return (blocks - cached.get(host, 0)) * PREFIX_BLOCK_TOKENS + PREFIX_LOAD_TOKENS * host.load / host.speed

    assert cost(prefix_aware(ask)) == min(cost(host) for host in hosts)


def test_without_hashes_it_is_the_shortest_queue_and_looks_nothing_up() -> None:
    def never() -> dict[Host, int]:
        raise AssertionError("nothing was to be looked up")

    idle, busy = Host("idle", 1.0, 0), Host("busy", 1.0, 0)
    ask = ask_of({idle: 0, busy: 1}, {}, 0)
    ask.matched = never
    assert prefix_aware(ask) is idle


# ── in a controller ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_further_turn_goes_where_the_first_one_went(fabric: FakeFabric) -> None:
    for name in ("a", "b", "c"):
        fabric.worker(name, model("m"), slots=4)
    fabric.submit("alice", 1, **prompt(2 * _LOAD_BLOCKS))
    home = where(fabric, 1)
    # The other workers have nothing to do, and yet what is cached is worth more than that.
    fabric.submit("alice", 2, **prompt(3 * _LOAD_BLOCKS))
    assert where(fabric, 2) == home
    fabric.submit("alice", 3, **prompt(3 * _LOAD_BLOCKS, start=7))
    assert where(fabric, 3) != home


def test_a_short_prefix_does_not_outweigh_load(fabric: FakeFabric) -> None:
    for name in ("a", "b"):
        fabric.worker(name, model("m"), slots=4)
    fabric.submit("alice", 1, **prompt(_LOAD_BLOCKS - 1))
    fabric.submit("alice", 2, **prompt(_LOAD_BLOCKS - 1))
    assert where(fabric, 1) != where(fabric, 2)


@pytest.mark.parametrize("gone", ["lose", "leave"])
def test_a_worker_that_was_gone_has_nothing_cached(fabric: FakeFabric, gone: str) -> None:
    fabric.worker("a", model("m"), slots=4)
    fabric.submit("alice", 1, **prompt(4))
    fabric.end_all("a")
    index = fabric.broker.registry.placement.index
    assert index.holders == 1
    getattr(fabric, gone)("a")
    assert index.holders == 0
    fabric.worker("a2", model("m"), slots=4)
    fabric.submit("alice", 2, **prompt(4))
    assert fabric.broker.registry.placement.figures["prefix_aware"].hits == 0


def test_a_prompt_of_one_model_is_not_cached_for_another(fabric: FakeFabric) -> None:
    fabric.worker("a", model("m"), model("n"), slots=4)
    fabric.submit("alice", 1, **prompt(4))
    fabric.submit("alice", 2, model="n", **prompt(4))
    figures = fabric.broker.registry.placement.figures["prefix_aware"]
    assert (figures.dispatches, figures.hits, figures.hit_tokens, figures.regret_tokens) == (2, 0, 0, 0)


def test_hits_and_what_another_worker_had_are_counted_by_policy() -> None:
    fabric = FakeFabric(policy="shortest_queue")
    fabric.client("alice")
    for name in ("a", "b"):
        fabric.worker(name, model("m"), slots=4)
    fabric.submit("alice", 1, **prompt(10))
    # The other worker has nothing to do, so it gets what the first one has cached; then both have it.
    fabric.submit("alice", 2, **prompt(12))
    fabric.submit("alice", 3, **prompt(10))
    fabric.submit("alice", 4)
    metrics = list(broker_metrics(fabric.broker))
    assert values(metrics, "zfabric_prefix_dispatches_total") == {"shortest_queuehit": 1, "shortest_queuemiss": 2}
    assert values(metrics, "zfabric_prefix_tokens_total") == {
        "shortest_queuecached": 160, "shortest_queueelsewhere": 160, "shortest_queuenowhere": 10 * 16 + 2 * 16,
    }  # fmt: skip
    assert values(metrics, "zfabric_prefix_blocks") == {"": 12}


# ── what workers tell ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_s_word_counts_more_than_dispatches(fabric: FakeFabric) -> None:
    for name in ("a", "b"):
        fabric.worker(name, model("m"), slots=4)
    hashes: bytes = prompt(40)["prefix"]
    index = fabric.broker.registry.placement.index
    fabric.tell("b", CachedBlocks(model="m", stored=hashes, whole=True, unit=16), slots=4)
    fabric.submit("alice", 1, **prompt(40))
    assert where(fabric, 1) == "b"
    fabric.tell("b", CachedBlocks(model="m", removed=hashes[8:], unit=16), slots=4)
    fabric.tell("a", CachedBlocks(model="nobody's", stored=hashes, unit=16), slots=4)
    assert list(index.matched(hashes_of(hashes)).values()) == [1]
    fabric.tell("b", CachedBlocks(model="m", whole=True, unit=16), slots=4)
    assert index.matched(hashes_of(hashes)) == {}


def test_of_a_prompt_an_engine_with_large_blocks_caches_whole_ones(fabric: FakeFabric) -> None:
    """Sixteen blocks and a half of 16 tokens are two of 128: nobody would ever tell that the rest is not there."""
    fabric.worker("a", model("m"), slots=4)
    fabric.tell("a", CachedBlocks(model="m", whole=True, unit=128), slots=4)
    fabric.submit("alice", 1, **prompt(18))
    assert list(fabric.broker.registry.placement.index.matched(hashes_of(prompt(18)["prefix"])).values()) == [16]


def test_a_worker_tells_its_changes_together_and_a_new_controller_all() -> None:
    side = WorkerSide(minor=3)
    blocks = [bytes([number]) * PREFIX_HASH_BYTES for number in range(3)]

    def told() -> list[CachedBlocks]:
        outbox, side.session.outbox = side.session.outbox, []
        loads = [codec.unpack_control(header) for header, _ in outbox if header[0] == kinds.LOAD]
        return [item for load in loads for item in load.cached]

    side.session.cached(CacheChange("m", blocks[:2], [], 16), 0)
    side.session.cached(CacheChange("m", blocks[2:], blocks[:1], 16), 0)
    assert told() == []
    side.session.tick(milliseconds(PREFIX_TELL_MS))
    (item,) = told()
    assert (item.whole, item.stored, item.removed) == (True, b"".join(blocks[1:]), blocks[0])
    side.session.cached(CacheChange("m", blocks[:1], [], 16), milliseconds(PREFIX_TELL_MS))
    side.reconnect(10**9)
    side.session.tick(3 * 10**9)
    (item,) = told()
    assert (item.whole, sorted(item.stored), item.removed) == (True, sorted(b"".join(blocks)), b"")


def test_an_older_controller_is_told_nothing_of_caches() -> None:
    side = WorkerSide()
    side.session.cached(CacheChange("m", [b"12345678"], [], 16), 0)
    side.session.tick(10**9)
    assert all(codec.unpack_control(header).cached == [] for header, _ in side.session.outbox)


@pytest.mark.parametrize(("minor", "length"), [(1, 0), (2, 4 * PREFIX_HASH_BYTES)])
def test_an_older_controller_gets_no_hashes(minor: int, length: int) -> None:
    wire = Wire()
    wire.up(minor=minor)
    wire.submit(prefix=prompt(4)["prefix"], prefix_block=PREFIX_BLOCK_TOKENS)
    ((envelope, _),) = wire.said_of("Submit")
    assert len(envelope.prefix) == length


# ── hashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hashes_of_tokens_are_as_they_are_documented() -> None:
    before, expected = bytes(8), b""
    for start in (0, 16):
        block = struct.pack("<16I", *range(start, start + 16))
        before = hashlib.blake2b(before + block, digest_size=8, person=b"zfabric.tokens").digest()
        expected += before
    assert token_hashes(range(40)) == expected
    assert token_hashes(range(16, 32), token_hashes(range(16))) == expected[8:]
    assert token_hashes([2**32 - 1] * 15) == b""


def test_hashes_of_texts_are_as_they_are_documented() -> None:
    block = ("ä" * 64).encode()
    first = hashlib.blake2b(bytes(8) + block, digest_size=8, person=b"zfabric.text").digest()
    assert text_hashes("ä" * 64 + "b" * 63) == first
    assert text_hashes("\ud800" * 64) != first
    assert len(text_hashes("a" * 10**6)) == PREFIX_BLOCKS_MAX * PREFIX_HASH_BYTES


def test_a_conversation_grows_at_its_end() -> None:
    chat = [{"role": "system", "content": "s" * 300}, {"role": "user", "content": "u" * 300}]
    first = text_hashes(rendered(chat))
    second = text_hashes(rendered([*chat, {"role": "assistant", "content": "a" * 300}]))
    assert len(first) == 8 * (len(rendered(chat)) // 64)
    assert second.startswith(first)
    assert len(second) > len(first)
    reordered = [{name: message[name] for name in reversed(message)} for message in chat]
    assert rendered(reordered) == rendered(chat)
    assert not text_hashes(rendered(chat, [{"type": "function"}])).startswith(first[:8])


def test_hints_are_sent_where_they_are_asked_for() -> None:
    _, silent = generate_request("x" * 200, {})
    assert "prefix" not in silent
    _, text = generate_request("x" * 200, {"prefix_hints": True})
    assert (text["prefix"], text["prefix_block"]) == (text_hashes("x" * 200), PREFIX_BLOCK_TOKENS)
    _, tokens = generate_request(None, {"prompt_token_ids": list(range(40)), "prefix_hints": True})
    assert tokens["prefix"] == token_hashes(range(40))
    messages = [{"role": "user", "content": "x" * 200}]
    _, chat = generate_request(None, {"messages": messages, "prefix_hints": True})
    assert chat["prefix"] == text_hashes(rendered(messages))
    _, short = generate_request("x", {"prefix_hints": True})
    assert (short["prefix"], short["prefix_block"]) == (b"", 0)
    with pytest.raises(RequestError, match="prefix_hints"):
        generate_request("x", {"prefix_hints": "yes"})
