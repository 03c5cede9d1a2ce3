"""Detokenising and stop strings: whatever the pieces, together they are the whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.backends.tiny import byte_tokenizer, fallback_tokenizer, unigram_tokenizer
from zfabric.backends.front.detokenizer import Detokenizer
from zfabric.backends.front.stop_strings import StopStrings
from zfabric.models.wheels import prepare

TOKENIZERS = {"byte-level": byte_tokenizer(), "byte-fallback": fallback_tokenizer()}


@functools.cache
def known(family: str) -> Any:
    """A tokenizer made here, or that of a real model."""
    made = {**TOKENIZERS, "unigram": unigram_tokenizer()}
    return made[family] if family in made else AutoTokenizer.from_pretrained(prepare(family))


@pytest.mark.parametrize("family", [*TOKENIZERS, "unigram", "smollm2", "minilm"])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(family: str, data: st.DataObject) -> None:
    tokenizer = known(family)
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


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(deadline=None)
@given(
    words=st.lists(st.sampled_from(["▁he", "llo", "▁wor", "ld", "a", "."]), min_size=2, max_size=20),
    at=st.integers(1, 19),
)
def test_an_answer_goes_on_after_its_prompt(family: str, words: list[str], at: int) -> None:
    tokenizer = TOKENIZERS[family]
    if family == "byte-level":
        tokens = tokenizer("".join(words).replace("▁", " "))["input_ids"]
    else:
        tokens = tokenizer.convert_tokens_to_ids(words)
    prompt, answer = tokens[:at], tokens[at:]
    detokenizer = Detokenizer(tokenizer)
    detokenizer.go_on_after(prompt)
    pieces = "".join([detokenizer.add(token) for token in answer]) + detokenizer.finish()
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(prompt, clean_up_tokenization_spaces=False) + pieces == whole


@settings(deadline=None, max_examples=300)
@given(data=st.lists(st.sampled_from([0x61, 0x80, 0xBF, 0xC3, 0xE4, 0xF0, 0x9F, 0x98, 0xFF]), max_size=80))
def test_bytes_that_make_no_characters_are_given_out_as_they_are(data: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer.convert_tokens_to_ids([bytes_to_unicode()[byte] for byte in data])
    detokenizer = Detokenizer(tokenizer)
    pieces = "".join([detokenizer.add(token) for token in tokens]) + detokenizer.finish()
    assert pieces == bytes(data).decode(errors="replace")


@pytest.mark.parametrize("text", [b"a", b"\xff", b"\xe4\xb8"])
def test_cost_per_token_does_not_grow(text: bytes) -> None:
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
    letters = [bytes_to_unicode()[byte] for byte in text * (2_000 // len(text))]
    for token in TOKENIZERS["byte-level"].convert_tokens_to_ids(letters):
        detokenizer.add(token)
    assert counting.decoded < 2_000 * 12


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
    # A match is known when it is complete: the one that ends first wins, wherever tokens end.
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


@given(st.text("ab", max_size=12), st.integers(0, 12), st.integers(1, 3))
def test_stop_strings_are_looked_for_behind_the_least_length_alone(text: str, free: int, size: int) -> None:
    checker = StopStrings(["ab"], free=free)
    shown, stopped = "", False
    for at in range(0, len(text), size):
        piece, stopped = checker.add(text[at : at + size], len(text[at : at + size]))
        shown += piece
        if stopped:
            break
    shown += "" if stopped else checker.finish()
    # A piece that reaches beyond the bound is looked at as a whole.
    begin = next((at for at in range(0, len(text), size) if min(at + size, len(text)) > free), len(text))
    found = text.find("ab", begin)
    assert stopped == (found >= 0)
    assert shown == (text[:found] if stopped else text)
