"""What is told of caches, put together again, is what the caches have: after any changes, reports and sessions."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.backends.front.cached import CacheTranslator
from zfabric.core.worker.cached import CacheChange, CacheReports
from zfabric.limits import PREFIX_BLOCK_TOKENS, PREFIX_HASH_BYTES, PREFIX_KEPT_BLOCKS_MAX, PREFIX_TOLD_BLOCKS
from zfabric.wire.load import CachedBlocks
from zfabric.wire.prefixes import token_hashes
from zfabric.worker.base import StepSink

block = st.integers(0, 12).map(lambda number: number.to_bytes(PREFIX_HASH_BYTES, "little"))
blocks = st.lists(block, max_size=6)
model = st.sampled_from(["a", "b"])
change = st.builds(CacheChange, model=model, stored=blocks, removed=blocks, unit=st.just(16), cleared=st.booleans())
step = change | st.sampled_from(["take", "session"])


def hashes(joined: bytes) -> list[bytes]:
    return [joined[start : start + PREFIX_HASH_BYTES] for start in range(0, len(joined), PREFIX_HASH_BYTES)]


class Reader:
    """What a controller knows of it."""

    def __init__(self) -> None:
        self.has: dict[str, set[bytes]] = {}

    def read(self, told: list[CachedBlocks]) -> None:
        assert sum(len(item.stored) + len(item.removed) for item in told) <= PREFIX_TOLD_BLOCKS * PREFIX_HASH_BYTES
        for item in told:
            if item.whole:
                self.has[item.model] = set()
            known = self.has.setdefault(item.model, set())
            known -= set(hashes(item.removed))
            known |= set(hashes(item.stored))


@given(st.lists(step, max_size=60))
def test_a_controller_knows_in_the_end_what_is_cached(steps: list[CacheChange | str]) -> None:
    reports, reader = CacheReports(), Reader()
    truth: dict[str, set[bytes]] = {}
    for one in steps:
        if one == "take":
            reader.read(reports.take())
        elif one == "session":
            reader = Reader()
            reports.again()
        else:
            assert isinstance(one, CacheChange)
            reports.changed(one)
            known = truth.setdefault(one.model, set())
            if one.cleared:
                known.clear()
            known -= set(one.removed)
            known |= set(one.stored)
    while reports.due:
        reader.read(reports.take())
    assert reader.has == truth


def test_what_is_kept_and_told_at_once_is_bounded() -> None:
    reports, reader = CacheReports(), Reader()
    many = [number.to_bytes(PREFIX_HASH_BYTES, "big") for number in range(PREFIX_KEPT_BLOCKS_MAX + 100)]
    reports.changed(CacheChange("m", many, [], 16))
    rounds = 0
    while reports.due:
        reader.read(reports.take())
        rounds += 1
    assert rounds >= PREFIX_KEPT_BLOCKS_MAX // PREFIX_TOLD_BLOCKS
    assert reader.has["m"] == set(many[100:])
    reports.changed(CacheChange("m", [], many, 16))
    while reports.due:
        reader.read(reports.take())
    assert reader.has["m"] == set()


def test_models_that_are_served_no_more_are_forgotten() -> None:
    reports = CacheReports()
    for name in ("a", "b"):
        reports.changed(CacheChange(name, [b"12345678"], [], 16))
    reports.forget(["b"])
    assert [item.model for item in reports.take()] == ["b"]


def sink(reports: CacheReports) -> StepSink:
    """Where an engine tells of its cache."""

    class Sink:
        def cache_changed_threadsafe(self, model: str, *changes: Any, **values: Any) -> None:
            reports.changed(CacheChange(model, *changes, **values))

    return cast(StepSink, Sink())


# ── vLLM's events ───────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=50)
@given(st.data(), st.sampled_from([16, 32, 128]))
def test_vllm_s_blocks_become_those_of_prompts(data: st.DataObject, unit: int) -> None:
    """A toy engine caches prompts and evicts blocks; what is told of it are the hashes of what it has."""
    translator, reports, reader = CacheTranslator("m"), CacheReports(), Reader()
    cached: dict[tuple[int, ...], int | None] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        if bool(cached) and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(cached)))
            # A block goes with all that follow it, or what follows can never be found.
            doomed = [known for known in cached if known[: len(gone)] == gone]
            translator.removed(doomed)
            for known in doomed:
                del cached[known]
        else:
            letters = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
            tokens = tuple(letter for letter in letters for _ in range(unit))
            ends = [end for end in range(unit, len(tokens) + 1, unit) if tokens[:end] not in cached]
            if ends:
                start = ends[0] - unit
                names = [tokens[:end] for end in ends]
                translator.stored(names, tokens[:start] or None, tokens[start:], unit, None, [None] * len(names))
                cached.update(dict.fromkeys(names))
        translator.tell(["m"], sink(reports))
        reader.read(reports.take())
    expected = {one for tokens in cached for one in hashes(token_hashes(tokens))}
    assert reader.has.get("m", set()) == expected


def test_adapters_have_their_own_and_salted_blocks_are_left_out() -> None:
    translator = CacheTranslator("m")
    tokens = list(range(2 * PREFIX_BLOCK_TOKENS))
    translator.stored(["x", "y"], None, tokens, PREFIX_BLOCK_TOKENS, "poet", [("poet",), ("poet",)])
    translator.stored(["s", "t"], None, tokens, PREFIX_BLOCK_TOKENS, None, [("salt",), None])
    translator.stored(["u"], "t", tokens[:PREFIX_BLOCK_TOKENS], PREFIX_BLOCK_TOKENS, None, None)
    translator.stored(["odd"], None, tokens[:24], 24, None, None)
    reports, reader = CacheReports(), Reader()
    translator.tell(["m", "poet"], sink(reports))
    reader.read(reports.take())
    assert reader.has == {"poet": set(hashes(token_hashes(tokens)))}
    translator.cleared()
    assert translator.due
    translator.tell(["m", "poet"], sink(reports))
    reader.read(reports.take())
    assert reader.has == {"m": set(), "poet": set()}
    translator.removed(["x"])
    assert not translator.due
