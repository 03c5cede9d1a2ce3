"""The index of cached prefixes against a plain model of it: a set of blocks for each holder."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.core.controller.prefixes import PrefixIndex, hashes_of

_HOLDERS = ("a", "b", "c", "d")
#: Prompts over few tokens share prefixes often; a block's hash stands for all tokens up to it, as chained hashes do.
_PROMPTS = st.lists(st.integers(0, 2), min_size=0, max_size=6)
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(("stored", "removed", "forget", "matched")),
        st.sampled_from(_HOLDERS),
        _PROMPTS,
        st.integers(0, 5),
    ),
    max_size=60,
)


def _chained(tokens: list[int]) -> list[int]:
    """Hashes that are equal where the prompts are equal up to there, and only there."""
    return [int("1" + "".join(map(str, tokens[: end + 1]))) for end in range(len(tokens))]


def _matched(cached: dict[str, set[int]], hashes: Sequence[int]) -> dict[str, int]:
    found = {}
    for holder, blocks in cached.items():
        count = next((place for place, block in enumerate(hashes) if block not in blocks), len(hashes))
        if count:
            found[holder] = count
    return found


@settings(max_examples=100)
@given(_STEPS)
def test_it_knows_what_each_holder_has(steps: list[tuple[str, str, list[int], int]]) -> None:
    index: PrefixIndex[str] = PrefixIndex()
    cached: dict[str, set[int]] = {}
    for what, holder, tokens, start in steps:
        hashes = _chained(tokens)
        if what == "stored":
            index.stored(holder, hashes)
            cached.setdefault(holder, set()).update(hashes)
        elif what == "removed":
            index.removed(holder, hashes[start:])
            cached.get(holder, set()).difference_update(hashes[start:])
        elif what == "forget":
            index.forget(holder)
            cached.pop(holder, None)
        assert index.matched(hashes) == _matched(cached, hashes)
    assert len(index) >= len(set().union(*cached.values())), "nothing is dropped below the bound"


@settings(max_examples=100)
@given(_STEPS, st.integers(1, 8))
def test_a_bounded_one_never_claims_what_is_not_there(
    steps: list[tuple[str, str, list[int], int]], blocks_max: int
) -> None:
    index: PrefixIndex[str] = PrefixIndex(blocks_max)
    cached: dict[str, set[int]] = {}
    for what, holder, tokens, start in steps:
        hashes = _chained(tokens)
        if what == "stored":
            index.stored(holder, hashes)
            cached.setdefault(holder, set()).update(hashes)
            kept = min(len(hashes), blocks_max)
            assert index.matched(hashes).get(holder, 0) >= kept, "the first blocks of what was just stored are kept"
        elif what == "removed":
            index.removed(holder, hashes[start:])
            cached.get(holder, set()).difference_update(hashes[start:])
        elif what == "forget":
            index.forget(holder)
            cached.pop(holder, None)
        assert len(index) <= blocks_max
        known = _matched(cached, hashes)
        assert all(count <= known.get(name, 0) for name, count in index.matched(hashes).items())


def test_a_place_that_is_given_out_again_brings_nothing_of_its_former_holder() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.stored("old", [1, 2, 3])
    index.stored("other", [1])
    index.forget("old")
    index.stored("new", [1])
    assert index.matched([1, 2, 3]) == {"other": 1, "new": 1}
    assert index.holders == 2


def test_two_hundred_holders_come_and_go() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for holder in range(200):
        index.stored(holder, range(holder % 7 + 1))
        if holder >= 20:
            index.forget(holder - 20)
    assert index.matched(range(10)) == {holder: holder % 7 + 1 for holder in range(180, 200)}


def test_hashes_are_read_as_they_are_sent() -> None:
    assert hashes_of(b"\x01" + bytes(7) + b"\xff" * 8 + b"left") == (1, 2**64 - 1)
    assert hashes_of(b"") == ()
