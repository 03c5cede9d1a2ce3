"""A dispatch can be explained: what its policy knew then, and how the hosts stand now."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tests.peers import FakeFabric, model
from zfabric.cli.explain import sentences
from zfabric.core.controller.access import Grant, Role
from zfabric.core.controller.dispatch import COSTS, POLICIES
from zfabric.errors import RequestError
from zfabric.limits import EXPLAINED_DISPATCHES, PREFIX_BLOCK_TOKENS, PREFIX_LOAD_TOKENS, STALL_MS
from zfabric.wire.explanations import Explanation
from zfabric.wire.prefixes import token_hashes

BLOCKS = 4
PROMPT: Final[dict[str, Any]] = {
    "prefix": token_hashes(list(range(BLOCKS * PREFIX_BLOCK_TOKENS))),
    "prefix_block": PREFIX_BLOCK_TOKENS,
}


def made(policy: str = "shortest_queue") -> FakeFabric:
    fabric = FakeFabric(policy=policy)
    fabric.client("alice")
    fabric.client("bob")
    return fabric


def explained(fabric: FakeFabric, request: str, **arguments: Any) -> Explanation:
    return msgspec.convert(fabric.query("alice", "explain", request=request, **arguments), Explanation)


def refused(fabric: FakeFabric, asker: str, request: str) -> str:
    answer = fabric.query(asker, "explain", request=request)
    assert answer.code == RequestError.code
    told: str = answer.message
    return told


def test_a_choice_is_told_with_what_the_policy_saw() -> None:
    fabric = made()
    fabric.worker("a", model(), slots=4)
    for number in (1, 2):
        fabric.submit("bob", number)
    fabric.worker("b", model(), slots=4)
    fabric.submit("alice", 0xAB)
    fabric.pass_ms(1_000, "a", "b")
    found = explained(fabric, "ab")
    (choice,) = found.choices
    assert (choice.worker, choice.decision, choice.policy, choice.ago_s) == ("b", "chosen", "shortest_queue", 1.0)
    assert (choice.candidates, choice.loads) == (2, {"a": 2, "b": 0})
    assert found.request is not None
    assert (found.request.state, found.request.worker) == ("running", "b")
    assert [(host.worker, host.state, host.load, host.cost, host.serves_it) for host in found.hosts] == [
        ("b", "open", 1, 1.0, True),
        ("a", "open", 2, 2.0, False),
    ]
    assert "chose among 2, with requests b 0, a 2." in sentences(found)[-1]


def test_what_waits_is_told_with_what_its_hosts_lack() -> None:
    fabric = made()
    fabric.worker("busy", model())
    fabric.worker("embeds", model("m", "embed"))
    fabric.submit("alice", 1)
    fabric.worker("leaving", model())
    fabric.submit("alice", 2)
    fabric.submit("alice", 3)
    fabric.load("leaving", draining=True)
    found = explained(fabric, "3")
    assert found.request is not None
    assert (found.request.state, found.choices) == ("queued", [])
    assert {host.worker: host.state for host in found.hosts} == {
        "busy": "full", "embeds": "unsuited", "leaving": "draining",
    }  # fmt: skip
    assert "is queued." in sentences(found)[0]
    fabric.end("busy", "alice", 1)
    (choice,) = explained(fabric, "3").choices
    assert (choice.worker, choice.decision, choice.candidates) == ("busy", "queued", 0)


def test_cached_blocks_and_the_regret_are_told() -> None:
    fabric = made("prefix_aware")
    fabric.worker("a", model(), slots=2)
    fabric.submit("bob", 1, **PROMPT)
    fabric.worker("b", model(), slots=2)
    fabric.submit("bob", 2)
    fabric.submit("bob", 3)
    fabric.submit("alice", 4, **PROMPT)
    (choice,) = explained(fabric, "4").choices
    assert (choice.blocks, choice.block_tokens, choice.candidates) == (BLOCKS, PREFIX_BLOCK_TOKENS, len(choice.loads))
    assert (choice.cached_most, choice.cached_most_at) == (BLOCKS, "a")
    found = explained(fabric, "4")
    costs = {host.worker: (host.cached, host.load, host.cost) for host in found.hosts}
    for cached, load, cost in costs.values():
        assert cost == (BLOCKS - cached) * PREFIX_BLOCK_TOKENS + PREFIX_LOAD_TOKENS * load


def test_affinity_is_told() -> None:
    fabric = made("sticky_least_loaded")
    for name in ("a", "b"):
        fabric.worker(name, model(), slots=4)
    fabric.submit("alice", 1, affinity="k")
    fabric.submit("alice", 2, affinity="k")
    (first,), (second,) = explained(fabric, "1").choices, explained(fabric, "2").choices
    assert (first.held, second.held) == ("", first.worker)
    assert {host.worker: host.held for host in explained(fabric, "2").hosts}[first.worker]


def test_a_request_that_has_ended_is_known_as_long_as_the_ring_is() -> None:
    fabric = made()
    fabric.worker("a", model(), slots=1)
    fabric.submit("alice", 0xAB)
    fabric.end("a", "alice", 0xAB)
    found = explained(fabric, "ab")
    assert (found.request, found.hosts, len(found.choices)) == (None, [], 1)
    assert sentences(found)[0] == "The request has ended."
    for number in range(1_000, 1_000 + EXPLAINED_DISPATCHES):
        fabric.submit("alice", number)
        fabric.end("a", "alice", number)
    assert refused(fabric, "alice", "ab") == "no request 'ab' is here, nor among the last dispatches"


def test_in_large_fabrics_the_least_loaded_is_told_and_hosts_are_cut() -> None:
    fabric = made()
    for number in range(40):
        fabric.worker(f"w{number}", model(), slots=2)
    fabric.submit("alice", 1)
    found = explained(fabric, "1", limit=10)
    (choice,) = found.choices
    assert (choice.candidates, list(choice.loads.values())) == (40, [0])
    assert (len(found.hosts), found.left_out) == (10, 30)
    assert "least loaded: " in sentences(found)[-1]


def test_everybody_has_its_own_explained_and_an_operator_all() -> None:
    fabric = made()
    fabric.worker("a", model(), slots=4)
    for name, role in (("carol", Role.CLIENT), ("olga", Role.OPERATOR)):
        fabric.client(name)
        fabric.broker.registry.clients[fabric.instances[name]].grant = Grant(name, frozenset({role}))
    fabric.submit("alice", 1)
    fabric.submit("alice", 2)
    fabric.end("a", "alice", 2)
    for request in ("1", "2"):
        assert fabric.query("olga", "explain", request=request)["choices"]
        assert fabric.query("alice", "explain", request=request)["choices"]
        assert refused(fabric, "carol", request)
    for wrong in ("", "xyz"):
        assert repr(wrong) in refused(fabric, "olga", wrong)


def test_a_stalled_engine_and_a_paused_model_are_told() -> None:
    fabric = made()
    fabric.worker("a", model())
    fabric.submit("alice", 1)
    for _ in range(STALL_MS // 1_000 + 1):
        fabric.pass_ms(1_000, "a")
        fabric.load("a")
    assert [host.state for host in explained(fabric, "1").hosts] == ["stalled"]
    fabric.query("alice", "pause", model="m")
    assert [host.state for host in explained(fabric, "1").hosts] == ["paused"]


def test_costs_are_of_policies_that_exist() -> None:
    assert set(COSTS) < set(POLICIES)
