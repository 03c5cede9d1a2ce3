"""The protocol's pages say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import pytest
from msgspec import Struct

from tests.document import annotate, conversation, fields
from tests.document.pages import PAGES, ROOT, names_in, rendered
from zfabric import errors
from zfabric.core.controller.request_state import RequestEvent, RequestState
from zfabric.wire import codec, kinds
from zfabric.wire.payloads import Delta

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_what_the_code_says(page: Path) -> None:
    text = page.read_text()
    assert text == rendered(text), f"write {page.name} anew: python -m tests.document"


def test_every_struct_of_the_wire_has_its_table() -> None:
    """All of them but `Delta`, which is what the library gives to its caller, and what a worker makes of another struct."""
    shown = {name.partition(" ")[2] for page in PAGES for name in names_in(page.read_text())}
    structs = fields.structs()
    derived = {name for name, kind in structs.items() if kind.__bases__ != (Struct,)}
    assert structs.keys() - derived - {Delta.__name__} <= shown
    assert not derived & shown


@pytest.mark.parametrize("name", sorted(fields.structs()))
def test_every_field_has_a_meaning(name: str) -> None:
    kind = fields.structs()[name]
    assert set(kind.__struct_fields__) == set(fields.meanings_of(kind))


def test_states_and_errors_have_meanings() -> None:
    assert set(fields.meanings_of(RequestState)) == set(RequestState.__members__)
    assert set(fields.meanings_of(RequestEvent)) == set(RequestEvent.__members__)
    assert [kind for kind in errors.BY_CODE.values() if not kind.__doc__] == []


def test_every_kind_has_its_section() -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "protocol" / "messages.md").read_text(), re.MULTILINE)
    assert set(kinds.NAMES.values()) <= set(headings)


def test_links_lead_somewhere() -> None:
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    dead = [
        f"{page.relative_to(ROOT)}: {target}" for page in pages for target in _targets(page) if not _leads(page, target)
    ]
    assert dead == []


def _targets(page: Path) -> list[str]:
    found = [match["target"] for match in _LINK.finditer(_CODE.sub("", page.read_text()))]
    return [target for target in found if "://" not in target]


def _leads(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    there = (page.parent / name).resolve() if name else page
    if not there.exists():
        return False
    return not anchor or anchor in _anchors(there)


def _anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_conversation_decodes_with_another_library() -> None:
    """What the page shows is MessagePack that others read, and the bytes shown are all bytes that are sent."""
    talk = conversation.held()
    said = {kinds.NAMES[message.header[0]] for message in talk.messages}
    assert said >= {"WORKER_HELLO", "CLIENT_HELLO", "WELCOME", "SUBMIT", "DISPATCH", "CHUNKS", "CREDIT", "GRANT"}
    assert said >= {"ENDS", "CANCEL", "ABORT", "GOODBYE"}
    for message in talk.messages:
        start = codec.ROUTE_BYTES if message.header[0] == kinds.CHUNKS else 1
        for data in (message.header[start:], message.body):
            if data:
                unpacked: Any = msgpack.unpackb(data, strict_map_key=False)
                assert isinstance(unpacked, list)
                assert b"".join(line.data for line in annotate.explained(data, None)) == data


def test_the_conversation_shows_every_byte() -> None:
    """Digits in the left column, put together, are a frame."""
    text = "\n".join(path.read_text() for path in PAGES if path.name == "bytes.md")
    shown = set()
    for block in re.findall(r"```text\n(.*?)\n```", text, re.DOTALL):
        rows = (row[: annotate.COLUMN] for row in block.splitlines())
        shown.add(bytes.fromhex(" ".join(rows)))
    sent = {frame for message in conversation.held().messages for frame in (message.header, message.body) if frame}
    assert shown == sent
