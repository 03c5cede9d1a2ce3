"""Detokenising and stop strings: whatever the pieces, together they are the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.tiny import byte_tokenizer, fallback_tokenizer
from zfabric.backends.hf_transformers.text import Detokenizer, StopStrings

TOKENIZERS = {"byte-level": byte_tokenizer(), "byte-fallback": fallback_tokenizer()}


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(family: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[family]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokens]
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) + detokenizer.finish() == whole


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30))
def test_no_half_character_is_ever_shown(family: str, text: str) -> None:
    tokenizer = TOKENIZERS[family]
    tokens = (
        [b + tokenizer.convert_tokens_to_ids("<0x00>") for b in text.encode()]
        if family == "byte-fallback"
        else (tokenizer(text)["input_ids"])
    )
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for token in tokens:
        shown += detokenizer.add(token)
        assert text.startswith((shown, " ")) or "�" in text


def test_cost_per_token_does_not_grow() -> None:
    class Counting:
        """Counts what a real tokenizer is asked to decode."""

        unk_token_id = None
        all_special_ids: tuple[int, ...] = ()

        def __init__(self) -> None:
            self.inner = TOKENIZERS["byte-level"]
            self.decoded = 0

        def convert_tokens_to_ids(self, token: str) -> int | None:
            return None

        def decode(self, tokens: list[int], **options: bool) -> str:
            self.decoded += len(tokens)
            return str(self.inner.decode(tokens, **options))

    counting = Counting()
    detokenizer = Detokenizer(counting)
    for token in TOKENIZERS["byte-level"]("a" * 2_000)["input_ids"]:
        detokenizer.add(token)
    assert counting.decoded < 2_000 * 6


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_stop_strings_are_found_first_and_never_shown(text: str, stops: list[str], sizes: list[int]) -> None:
    checker = StopStrings(stops)
    shown, stopped, position = "", False, 0
    for size in sizes:
        if stopped or position >= len(text):
            break
        piece, stopped = checker.add(text[position : position + size])
        shown += piece
        position += size
    if not stopped:
        shown += checker.finish()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    # A match is known when it is complete, so of two the one that ends first may win over one that begins first.
    assert stopped == bool(ends)
    if stopped:
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == text
