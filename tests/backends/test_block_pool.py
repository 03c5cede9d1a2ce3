"""Blocks of the cache: who has them, what they hold, and which are free, against plain books of the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zfabric.backends.hf_transformers.cache.block_pool import BlockPool, BlockTable
from zfabric.backends.hf_transformers.cache.free_blocks import FreeBlocks

SIZE, TOKENS = 12, 2


@given(st.lists(st.tuples(st.sampled_from(["take", "next", "give"]), st.integers(0, 15)), max_size=80))
def test_free_blocks_are_those_that_nobody_has(calls: list[tuple[str, int]]) -> None:
    blocks, free = FreeBlocks(16), set(range(16))
    for call, number in calls:
        if call == "next":
            assert blocks.take_next(number) == (number in free)
            free.discard(number)
        elif call == "give" and number not in free:
            blocks.give(number)
            free.add(number)
        elif call == "take" and free:
            taken = blocks.take()
            assert taken in free
            free.discard(taken)
        assert len(blocks) == len(free)
    assert {blocks.take() for _ in range(len(blocks))} == free


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

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE, TOKENS)
        self.rows: list[tuple[BlockTable, int, list[int]]] = []
        #: What was written to each place of each block: the whole text up to there, and its root.
        self.written: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        #: What roots are called in these books; other ones after each renewal.
        self.first_root = 0

    def write(self, table: BlockTable, root: int, text: list[int], begin: int) -> None:
        for place in range(begin, len(text)):
            block = table.blocks[place // TOKENS]
            others = [one for one, _, _ in self.rows if one is not table and block in one.blocks[one.given_back :]]
            assert not others, "a block that another row reads is written to"
            self.written[block, place % TOKENS] = (root, tuple(text[: place + 1]))
        self.pool.learn(table, text)

    @rule(root=st.integers(0, 1), text=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def come(self, root: int, text: list[int]) -> None:
        shared = self.pool.find(text, root)
        assert len(shared) * TOKENS < len(text)
        table = self.pool.open(root, shared)
        if not self.pool.grow(table, self.pool.blocks_for(len(text))):
            self.pool.close(table)
            return
        root += self.first_root
        for place in range(len(shared) * TOKENS):
            assert self.written[table.blocks[place // TOKENS], place % TOKENS] == (root, tuple(text[: place + 1]))
        self.rows.append((table, root, list(text)))
        self.write(table, root, text, len(shared) * TOKENS)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), token=st.integers(0, 1))
    def step(self, data: st.DataObject, token: int) -> None:
        table, root, text = data.draw(st.sampled_from(self.rows))
        if self.pool.grow(table, self.pool.blocks_for(len(text) + 1)):
            text.append(token)
            self.write(table, root, text, len(text) - 1)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, root, text = data.draw(st.sampled_from(self.rows))
        whole = len(text) // TOKENS
        other = self.pool.fork(table, whole)
        if len(text) % TOKENS:
            if not self.pool.grow(other, whole + 1):
                self.pool.close(other)
                return
            for place in range(len(text) % TOKENS):
                self.written[other.blocks[whole], place] = self.written[table.blocks[whole], place]
        self.rows.append((other, root, list(text)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), window=st.integers(1, 6))
    def slide(self, data: st.DataObject, window: int) -> None:
        table, _, text = data.draw(st.sampled_from(self.rows))
        before, count = table.given_back, max(0, len(text) - window) // TOKENS
        self.pool.give_back(table, count)
        assert table.given_back == max(before, count)

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
        self.pool.renew([table for table, _, _ in self.rows])
        self.first_root += 2
        for table, root, text in self.rows:
            for place in range(len(text)):
                where, before = (table.blocks[place // TOKENS], place % TOKENS), tuple(text[: place + 1])
                if self.written[where] == (root, before):
                    self.written[where] = (-1, before)
        self.rows = [(table, -1, text) for table, _, text in self.rows]

    @invariant()
    def every_row_reads_its_own_text(self) -> None:
        for table, root, text in self.rows:
            for place in range(table.given_back * TOKENS, len(text)):
                held = self.written[table.blocks[place // TOKENS], place % TOKENS]
                assert held == (root, tuple(text[: place + 1]))

    @invariant()
    def what_is_not_in_use_is_available(self) -> None:
        used = {block for table, _, _ in self.rows for block in table.blocks[table.given_back :]}
        assert self.pool.available == SIZE - len(used)


TestRows = Rows.TestCase


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
    assert len(pool.find([1, 1, 1, 1, 0], 0)) == 1
    assert len(pool.find([2, 2, 2, 2, 0], 0)) == 2
    assert not pool.find([2, 2, 2, 2, 0], 1)
    assert not pool.grow(table, 7)
    assert len(table.blocks) == 3
