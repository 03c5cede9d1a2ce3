"""Blocks of the cache: who has them, what they hold, and which are free, against plain books of the same."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zfabric.backends.hf_transformers.cache.block_pool import BlockPool
from zfabric.backends.hf_transformers.cache.block_table import BlockTables
from zfabric.backends.hf_transformers.cache.free_blocks import FreeBlocks
from zfabric.backends.hf_transformers.cache.idle_blocks import IdleBlocks
from zfabric.backends.hf_transformers.cache.known_blocks import KnownBlocks
from zfabric.backends.hf_transformers.cache.kv_layout import KVLayout, layout_of

SIZE, TOKENS = 12, 2
#: Tokens of a row that a pass computes at most, and one that is known late.
AHEAD = 4


@given(
    st.lists(st.tuples(st.sampled_from(["take", "next", "give"]), st.integers(0, 15), st.integers(1, 6)), max_size=80)
)
def test_free_blocks_are_those_that_nobody_has(calls: list[tuple[str, int, int]]) -> None:
    blocks, free = FreeBlocks(16), set(range(16))
    for call, number, count in calls:
        wanted = range(number, min(16, number + count))
        if call == "next":
            expected = len([*itertools.takewhile(free.__contains__, wanted)])
            assert blocks.take_next(number, count) == expected
            free -= {*wanted[:expected]}
        elif call == "give" and not free.intersection(wanted):
            blocks.give(wanted.start, wanted.stop)
            free.update(wanted)
        elif call == "take" and free:
            longest = max(len([*itertools.takewhile(free.__contains__, itertools.count(one))]) for one in free)
            first, taken = blocks.take(count)
            assert taken == min(count, longest)
            assert free.issuperset(range(first, first + taken))
            free -= {*range(first, first + taken)}
        assert len(blocks) == len(free)
    assert {blocks.take()[0] for _ in range(len(blocks))} == free


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "pop"]), st.integers(0, 15), st.integers(1, 9)), max_size=60)
)
def test_idle_blocks_go_in_the_order_in_which_they_were_left(calls: list[tuple[str, int, int]]) -> None:
    blocks, order = IdleBlocks(16), list[int]()
    for call, begin, count in calls:
        wanted = range(begin, min(16, begin + count))
        assert blocks.count([*wanted]) == len({*wanted} & {*order})
        if call == "add" and not {*wanted} & {*order}:
            blocks.add(wanted.start, wanted.stop)
            order += reversed(wanted)
        elif call == "remove":
            blocks.remove(wanted.start, wanted.stop)
            order = [block for block in order if block not in wanted]
        elif call == "pop" and order:
            first, after = blocks.pop(count)
            assert 0 < after - first <= count
            assert order[: after - first] == [*reversed(range(first, after))]
            del order[: after - first]
        assert len(blocks) == len(order)
    while blocks:
        first, after = blocks.pop(16)
        assert order[: after - first] == [*reversed(range(first, after))]
        del order[: after - first]
    assert not order


def test_what_is_forgotten_is_not_found_again_before_it_is_known_again() -> None:
    known = KnownBlocks(4, TOKENS, 1)
    keys = [known.key(("root",), [number, number]) for number in range(3)]
    assert known.add(0, keys[0]) != known.add(1, keys[1])
    known.forget(0, 2)
    assert [known.find(key) for key in keys] == [None, None, None]
    # What a block held before may be another's when the block holds something else.
    known.add(2, keys[0])
    known.add(0, keys[2])
    known.add(1, keys[1])
    assert [known.find(key) for key in keys] == [2, 1, 0]
    assert known.key(3, [1, 2]) != known.key(("root",), [1, 2]) != known.key(("other",), [1, 2])


def test_a_text_as_long_as_all_that_is_free_lies_on_end() -> None:
    pool = BlockPool(16, TOKENS)
    first, second = pool.open(0), pool.open(0)
    assert pool.grow(first, 4)
    assert pool.grow(second, 12)
    assert [table.each[0].runs for table in (first, second)] == [[[0, 4]], [[4, 16]]]


def test_rows_that_grow_beside_one_another_stay_whole() -> None:
    pool = BlockPool(64, TOKENS)
    tables = [pool.open(0) for _ in range(4)]
    for count in range(1, 9):
        for table in tables:
            assert pool.grow(table, count)
    for table in tables:
        assert table.blocks == list(range(table.blocks[0], table.blocks[0] + 8))


class Rows(RuleBasedStateMachine):
    """Rows that come, grow, fork and go. Each knows its text; a block's writer notes what it wrote."""

    layout = KVLayout()

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE * len(self.layout.windows), TOKENS, self.layout)
        self.rows: list[tuple[BlockTables, int, list[int]]] = []
        #: What was written to each place of each block: the table, the whole text up to there, and its root.
        self.written: dict[tuple[int, int], tuple[int, int, tuple[int, ...]]] = {}
        #: What roots are called in these books; other ones after each renewal.
        self.first_root = 0

    def reads(self, tables: BlockTables, root: int, text: list[int], begin: int, end: int) -> None:
        """What the tokens from `begin` on look at, once they are written, is the row's own text."""
        for index, (table, window) in enumerate(zip(tables.each, self.layout.windows, strict=True)):
            for place in range(0 if window is None else max(0, begin + 1 - window), end):
                assert place // TOKENS >= table.given_back
                held = self.written[table.blocks[place // TOKENS], place % TOKENS]
                assert held == (index, root, tuple(text[: place + 1]))

    def write(self, tables: BlockTables, root: int, text: list[int], begin: int) -> None:
        for index, table in enumerate(tables.each):
            for place in range(begin, len(text)):
                block = table.blocks[place // TOKENS]
                others = [its for row, _, _ in self.rows if row is not tables for its in row.each]
                assert not any(block in one.blocks[one.given_back :] for one in others), "another row reads it"
                self.written[block, place % TOKENS] = (index, root, tuple(text[: place + 1]))
        self.reads(tables, root, text, begin, len(text))
        self.pool.learn(tables, text)

    @rule(root=st.integers(0, 1), text=st.lists(st.integers(0, 1), min_size=1, max_size=14), part=st.integers(1, AHEAD))
    def come(self, root: int, text: list[int], part: int) -> None:
        """A prompt, computed in parts."""
        shared = self.pool.find(text, root)
        done = shared.whole * TOKENS
        assert done < len(text)
        count = self.pool.blocks_for(len(text))
        needed, before = self.pool.taken(shared, count), self.pool.available
        tables = self.pool.open(root, shared)
        fits = self.pool.grow(tables, count)
        assert fits == (needed <= before)
        if not fits:
            self.pool.close(tables)
            return
        assert self.pool.available == before - needed
        root += self.first_root
        self.reads(tables, root, text, done, done)
        self.rows.append((tables, root, text[:done]))
        while done < len(text):
            if not self.pool.grow(tables, count):
                return
            its = self.rows[-1][2]
            its += text[done : done + part]
            self.write(tables, root, its, done)
            done = len(its)
            self.pool.give_back(tables, done)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), token=st.integers(0, 1), late=st.integers(0, 1))
    def step(self, data: st.DataObject, token: int, late: int) -> None:
        """A token more. What was drawn before it may be known one step late."""
        tables, root, text = data.draw(st.sampled_from(self.rows))
        if self.pool.grow(tables, self.pool.blocks_for(len(text) + 1)):
            text.append(token)
            self.write(tables, root, text, len(text) - 1)
            self.pool.give_back(tables, len(text) - late)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tables, root, text = data.draw(st.sampled_from(self.rows))
        whole = len(text) // TOKENS
        others = self.pool.fork(tables, whole)
        if len(text) % TOKENS:
            if not self.pool.grow(others, whole + 1):
                self.pool.close(others)
                return
            for table, other in zip(tables.each, others.each, strict=True):
                for place in range(len(text) % TOKENS):
                    self.written[other.blocks[whole], place] = self.written[table.blocks[whole], place]
        self.rows.append((others, root, list(text)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.rows.remove(row)
        self.pool.close(row[0])

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @rule()
    def renew(self) -> None:
        """Rows go on, and nobody who comes finds what was written before, nor what these rows write then."""
        self.pool.renew([tables for tables, _, _ in self.rows])
        self.first_root += 2
        for tables, root, text in self.rows:
            for index, table in enumerate(tables.each):
                for place in range(len(text)):
                    where, held = (
                        (table.blocks[place // TOKENS], place % TOKENS),
                        (index, root, tuple(text[: place + 1])),
                    )
                    if self.written.get(where) == held:
                        self.written[where] = (index, -1, held[2])
        self.rows = [(tables, -1, text) for tables, _, text in self.rows]

    @invariant()
    def every_row_reads_its_own_text(self) -> None:
        for tables, root, text in self.rows:
            self.reads(tables, root, text, len(text), len(text))

    @invariant()
    def windows_bound_what_a_row_has(self) -> None:
        for tables, _, text in self.rows:
            for table, window in zip(tables.each, self.layout.windows, strict=True):
                if window is not None:
                    assert len(table.blocks) - table.given_back <= -(-(window + AHEAD) // TOKENS) + 1
                    assert len(table.blocks) >= self.pool.blocks_for(len(text))

    @invariant()
    def what_is_not_in_use_is_available(self) -> None:
        used = {
            block for tables, _, _ in self.rows for table in tables.each for block in table.blocks[table.given_back :]
        }
        assert self.pool.available == self.pool.size - len(used)


class Windows(Rows):
    """All layers have one."""

    layout = KVLayout((3,), ahead=AHEAD)


class Both(Rows):
    """Layers with and without one."""

    layout = KVLayout((None, 3, 3), 1, 3, ahead=AHEAD)


class Several(Rows):
    """Windows of several lengths."""

    layout = KVLayout((None, 1, 5), 1, 3, ahead=AHEAD)


TestRows, TestWindows, TestBoth, TestSeveral = Rows.TestCase, Windows.TestCase, Both.TestCase, Several.TestCase
for case in (TestRows, TestWindows, TestBoth, TestSeveral):
    case.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_was_used_the_longest_ago_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(6, TOKENS)
    for text in ([1, 1, 1, 1], [2, 2, 2, 2]):
        table = pool.open(0)
        pool.grow(table, 2)
        pool.learn(table, text)
        pool.close(table)
    assert pool.available == 6
    table = pool.open(0)
    assert pool.grow(table, 3)
    assert pool.find([1, 1, 1, 1, 0], 0).whole == 1
    assert pool.find([2, 2, 2, 2, 0], 0).whole == 2
    assert not pool.find([2, 2, 2, 2, 0], 1).whole
    assert not pool.grow(table, 7)
    assert len(table.blocks) == 3


def test_a_beginning_is_shared_as_far_as_its_windows_reach() -> None:
    pool = BlockPool(40, TOKENS, KVLayout((None, 4), 1, 2, ahead=8))
    text = list(range(16))
    first = pool.open(0)
    for end in (8, 16):
        assert pool.grow(first, 8)
        pool.learn(first, text[:end])
        pool.give_back(first, end)
    # Of a window of four tokens, the next one included, two blocks are left; those before them are known, and nobody's.
    assert (len(first.blocks), first.each[1].given_back) == (8, 6)
    assert pool.find([*text, 0], 0).whole == 8
    assert pool.find([*text[:11], 99, 99], 0).whole == 5
    # All that is free, and the six that were given back.
    others = pool.open(1)
    assert pool.grow(others, 23)
    assert pool.find([*text, 0], 0).whole == 8
    assert [len(its) for its in pool.find([*text, 0], 0).each] == [8, 2]
    # Where those behind the window are gone, a text that leaves this one earlier shares none of it.
    assert pool.find([*text[:11], 99, 99], 0).whole == 0


def test_layers_share_blocks_by_what_they_look_at() -> None:
    def layout(full: int, sliding: int, window: int = 512, length: int = 8_192, *, alike: bool = True) -> KVLayout:
        every = (full + sliding) // full if full else 1
        windows = {layer: None if full and layer % every == every - 1 else window for layer in range(full + sliding)}
        return layout_of(windows, length, ahead=128, alike=alike)

    gemma2, gemma3, cohere2 = layout(13, 13), layout(4, 20), layout(8, 24)
    assert (gemma2.windows, gemma2.slots) == ((None, 512), 13)
    assert (gemma3.windows, gemma3.slots) == ((None, *[512] * 5), 4)
    assert (cohere2.windows, cohere2.slots) == ((None, *[512] * 3), 8)
    # No two layers have the same place.
    assert len(set(gemma3.places.values())) == 24
    # A cache of the same size holds more of a long text, and as much of short ones.
    blocks = gemma3.blocks(8_192, 16)
    assert gemma3.cells(blocks, 16) == 8_192
    assert gemma3.longest(100_000, blocks, 16) > 5 * 8_192
    assert gemma3.longest(1_000, blocks, 16) == 1_000
    assert blocks // gemma3.taken(8_192, 16) == 4
    assert blocks // gemma3.taken(512, 16) == 8_192 // 512
    for one in (layout(8, 8, length=512), KVLayout()):
        assert one.windows == (None,)
    assert layout(0, 12).windows == (512,)
    assert layout(4, 20, alike=False).kept_because == "keys and values of its layers differ in shape"
    assert layout(1, 30).kept_because == "its groups of layers need 31 tables, more than 8"
