"""docs/gateway-compatibility.md: every difference, and who is right."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import httpx2

from tests.compatibility.cases import CASES
from tests.compatibility.compare import Difference, differences
from tests.compatibility.observe import observe
from tests.compatibility.rules import RULES, Rule, rule_of

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "gateway-compatibility.md"
#: Names that are written out in one cell of the table.
_SHOWN: Final = 4
_INTRODUCTION: Final = """\
# The gateway beside vLLM's own OpenAI server

`python -m tests.compatibility` sends the same {count} requests to vLLM's server and to the gateway in front of the same model,
and writes this page; the tests send them as well, and compare what comes with the page. Compared are the status, the form of
errors, the type of every field, the order of events, reasons of ends, texts, log-probabilities and counts of tokens; not the
wording of messages, names and times. Models are a tiny random Llama, which answers greedily or by seed, and all-MiniLM-L6-v2.
A field that is null and one that is absent count as different. How many tokens one event has depends on who is faster, at both
servers, and is not compared; vLLM's server also sends an event for a token that has no text yet, where the gateway sends none.

{same} requests are answered with the same status and, but for the fields below, the same answer. Every difference is in this
table, with who does what [OpenAI's reference](https://platform.openai.com/docs/api-reference) says.

| what differs | vLLM's server | gateway | requests | right | why |
|---|---|---|---|---|---|
"""


async def compared(client: httpx2.AsyncClient, theirs: str, embeddings: str, ours: str) -> list[Difference]:
    """All differences.

    Args:
        client: For any server.
        theirs: Root of vLLM's server.
        embeddings: Root of vLLM's server that makes vectors: it serves one kind of model.
        ours: Root of the gateway.
    """
    found: list[Difference] = []
    for case in CASES:
        other = embeddings if case.path == "/v1/embeddings" else theirs
        found += differences(case, await observe(client, other, case), await observe(client, ours, case))
    return found


def idle(found: list[Difference]) -> list[Rule]:
    """Rules that are about nothing any more."""
    used = {rule_of(difference) for difference in found}
    return [rule for rule in RULES if rule not in used]


def unexplained(found: list[Difference]) -> list[Difference]:
    """Those that no rule is about."""
    return [difference for difference in found if rule_of(difference) is None]


def rendered(found: list[Difference]) -> str:
    """The page."""
    statuses = {difference.case for difference in found if difference.aspect == "status"}
    groups: dict[Rule, list[Difference]] = {rule: [] for rule in RULES}
    for difference in found:
        rule = rule_of(difference)
        if rule is not None:
            groups[rule].append(difference)
    rows = [_row(rule, group) for rule, group in groups.items() if group]
    introduction = _INTRODUCTION.format(count=len(CASES), same=len(CASES) - len(statuses))
    requests = ["", "## The requests", "", *_requests(), ""]
    return introduction + "\n".join([*rows, *requests])


def _row(rule: Rule, group: list[Difference]) -> str:
    cells = [
        _listed([difference.aspect for difference in group], every=True),
        _listed([difference.theirs for difference in group]),
        _listed([difference.ours for difference in group]),
        _cases(list(dict.fromkeys(difference.case for difference in group))),
        rule.right,
        rule.why,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _listed(words: list[str], *, every: bool = False) -> str:
    """Each once, in their order."""
    different = list(dict.fromkeys(words))
    shown = different if every else different[:_SHOWN]
    return ", ".join(f"`{word}`" for word in shown) + (", …" if len(shown) < len(different) else "")


def _cases(names: list[str]) -> str:
    return "; ".join(names) if len(names) <= _SHOWN else f"{len(names)} of them, such as {names[0]}"


def _requests() -> list[str]:
    """One line a group."""
    groups: dict[str, list[str]] = {}
    for case in CASES:
        group, _, name = case.name.partition(": ")
        groups.setdefault(group, []).append(name or group)
    return [f"- **{group}**: {'; '.join(names)}." for group, names in groups.items()]
