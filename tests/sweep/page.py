"""The findings of a sweep as a page of the docs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from tests.sweep.subject import FLAT, Finding

_HEADINGS = {
    "causal": "Decoders (`AutoModelForCausalLM`)",
    "vision": "Models that see images (`AutoModelForImageTextToText`), asked with text alone",
    "paired": "Encoder-decoders (`AutoModelForSeq2SeqLM`)",
    "encoder": "Encoders (`AutoModel`), mean of the last hidden states",
}
_VERDICTS = {
    "same": "same as transformers itself, in a batch and alone",
    "refused": "refused by name when it is loaded",
    "wrong": "**wrong**",
    "not made": "not known: no tiny model of it can be made without its makers' files or other packages",
}


def page(findings: Sequence[Finding]) -> str:
    """Markdown: a list of names for each verdict, and why what is refused is refused."""
    parts = [
        "# Architectures of transformers that the `transformers` backend serves",
        "",
        f"`make sweep` makes this page: a tiny random model of every architecture of transformers {version('transformers')}",
        "is served by ModelWorker, several texts at once, and its tokens (or vectors) are compared with those of `generate`",
        "for each text alone. What cannot be batched is found out when a model is loaded, by asking the model itself",
        "(`self_check.py`), so the rule holds for architectures that this page does not know, too. Models with a head for",
        "sequences are not on it: they are asked in the same way when they are loaded, and `tests/backends/test_classifiers.py`",
        "compares ten families of them with transformers.",
        "",
    ]
    for kind, heading in _HEADINGS.items():
        parts += [f"## {heading}", ""]
        for verdict, meaning in _VERDICTS.items():
            rows = [finding for finding in findings if (finding.kind, finding.verdict) == (kind, verdict)]
            if not rows:
                continue
            parts += [f"{len(rows)} {meaning}:", ""]
            if verdict in ("same", "not made"):
                parts += [", ".join(f"`{row.architecture}`" for row in rows) + ".", ""]
                flat = [f"`{row.architecture}`" for row in rows if row.reason == FLAT]
                parts += (
                    [f"Of these so few different tokens came that it says little: {', '.join(flat)}.", ""]
                    if flat
                    else []
                )
            else:
                parts += ["| architecture | why |", "|---|---|"]
                parts += [f"| `{row.architecture}` | {row.reason.replace('|', '/')} |" for row in rows] + [""]
    return "\n".join(parts)
