"""Nobody waits for ever: models at one worker, priorities, and demands that few workers can meet, however busy the others are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers import FakeFabric, model
from zfabric.limits import TURNS_BY_AGE

#: How many requests of others that wait are kept up at all times: more come as fast as some end.
BUSY = 8


class Load:
    """A worker of several models with one slot, and requests that never end to come."""

    def __init__(self, *names: str) -> None:
        self.fabric = FakeFabric()
        for client in ("alice", "bob"):
            self.fabric.client(client)
        self.fabric.worker("w", *map(model, names))
        self.number = 0
        #: The models of what was served, in order.
        self.served: list[str] = []

    def submit(self, name: str, priority: int = 0, client: str = "alice") -> int:
        self.number += 1
        self.fabric.submit(client, self.number, model=name, priority=priority)
        return self.number

    def keep_busy(self, names: list[tuple[str, int]]) -> None:
        """Have so many wait of each of these models and priorities."""
        for name, priority in names:
            waiting = sum(request.priority == priority and request.asked == name for request in self.fabric.waiting())
            for _ in range(BUSY - waiting):
                self.submit(name, priority)

    def serve(self) -> int:
        """The request that runs ends, and the next has its turn. Returns which has ended."""
        ((key, request),) = self.fabric.broker.registry.workers["w"].live.items()
        client = "alice" if key[0] == self.fabric.instances["alice"] else "bob"
        self.served.append(request.asked)
        self.fabric.end("w", client, request.request)
        return request.request


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.lists(st.booleans(), min_size=30, max_size=60))
def test_a_rare_model_waits_for_one_turn_of_each_other(others: int, asks: list[bool]) -> None:
    names = [f"busy-{number}" for number in range(others)]
    load = Load("rare", *names)
    waits: dict[int, int] = {}
    for ask in asks:
        load.keep_busy([(name, 0) for name in names])
        if ask and not waits:
            waits[load.submit("rare", client="bob")] = len(load.served)
        ended = load.serve()
        if ended in waits:
            # The one that ran, one of each other, itself, and once in a while one more since it is the oldest.
            turns = len(load.served) - waits.pop(ended)
            assert turns <= 1 + others + 1 + turns // TURNS_BY_AGE + 1
        assert all(len(load.served) - since <= others + 4 for since in waits.values())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.booleans())
def test_models_that_are_always_wanted_get_their_weights_share(weights: list[int], two_clients: bool) -> None:
    names = [f"m{number}" for number in range(len(weights))]
    load = Load(*names)
    for name, weight in zip(names, weights, strict=True):
        assert load.fabric.query("alice", "set_config", name=f"weight.{name}", value=weight)["value"] == weight
    rounds = 4
    for turn in range(rounds * sum(weights)):
        load.keep_busy([(name, 0) for name in names])
        if two_clients:
            load.submit(names[turn % len(names)], client="bob")
        load.serve()
    aged = len(load.served) // TURNS_BY_AGE + 1
    for name, weight in zip(names, weights, strict=True):
        # The first to come had a turn before any weight was known, and one in so many goes for its age.
        assert abs(load.served.count(name) - rounds * weight) <= max(weights) + aged


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 20), st.integers(0, 3), st.booleans())
def test_a_low_priority_ends_however_much_comes_before_it(older: int, rare: int, same_model: bool) -> None:
    load = Load("m", "other")
    for _ in range(older):
        load.submit("m")
    low = [load.submit("m" if same_model else "other", 5, client="bob") for _ in range(rare + 1)]
    ahead = older + len(low)
    bound = TURNS_BY_AGE * (ahead + 1)
    ended: list[int] = []
    while not set(low) <= set(ended):
        load.keep_busy([("m", 0)])
        ended.append(load.serve())
        assert len(ended) <= bound, f"{len(set(low) & set(ended))} of {len(low)} ended"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["m", "other"]), min_size=20, max_size=60))
def test_models_that_both_have_much_waiting_take_turns(order: list[str]) -> None:
    load = Load("m", "other")
    for name in order:
        load.submit(name)
    while any(request.asked == "m" for request in load.fabric.waiting()) and any(
        request.asked == "other" for request in load.fabric.waiting()
    ):
        load.serve()
    # What was dispatched at once is no turn, and one of sixteen goes by age.
    turns = load.served[1:]
    assert abs(turns.count("m") - turns.count("other")) <= 2 + len(turns) // TURNS_BY_AGE


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_what_only_one_worker_can_do_does_not_stand_in_the_way(first: int, second: int) -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("makes", model("m", "generate"))
    fabric.worker("embeds", model("m", "embed"))
    for number in range(first):
        fabric.submit("alice", number, "generate")
    for number in range(second):
        fabric.submit("alice", 100 + number, "embed")
    while fabric.end_all("embeds"):
        pass
    assert not [request for request in fabric.waiting() if request.operation == "embed"]
    assert len([request for request in fabric.waiting() if request.operation == "generate"]) == first - 1
    while fabric.end_all("makes"):
        pass
    assert not fabric.waiting()
