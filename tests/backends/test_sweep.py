"""A short sweep over architectures, and what the page of the long one has to hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.sweep.__main__ import architectures, in_a_process
from tests.sweep.subject import Kind, Verdict

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
#: One of each way to be served or refused.
SHORT: list[tuple[str, Kind, Verdict]] = [
    ("gemma4_text", "causal", "same"),
    ("deepseek_v3", "causal", "same"),
    ("gpt_oss", "causal", "same"),
    ("phi4_multimodal", "causal", "same"),
    ("bert", "causal", "refused"),
    ("roformer+decoder", "causal", "refused"),
    ("bart", "causal", "refused"),
    ("xlnet", "causal", "refused"),
    ("nemotron_h", "causal", "same"),
    ("zamba2", "causal", "same"),
    ("hy_v4", "causal", "same"),
    ("bert-generation+decoder", "causal", "same"),
    ("cpmant", "causal", "refused"),
    ("roberta", "encoder", "same"),
    ("yoso", "encoder", "refused"),
    ("t5", "paired", "same"),
    ("mbart", "paired", "same"),
    ("nllb-moe", "paired", "same"),
]


@pytest.mark.parametrize(("name", "kind", "verdict"), SHORT)
def test_an_architecture_is_served_as_it_is_or_refused_by_name(name: str, kind: Kind, verdict: Verdict) -> None:
    finding = in_a_process(name, kind)
    assert finding.verdict == verdict, finding


def test_the_page_knows_every_architecture_and_none_is_wrong() -> None:
    text = PAGE.read_text()
    assert "wrong" not in text
    named = set(re.findall(r"`([^` ]+)`", text))
    for kind in ("causal", "vision", "paired", "encoder"):
        assert set(architectures(kind)) <= named
