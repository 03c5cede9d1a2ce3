"""How a backend is found by its name, and what is said where that cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zfabric.backends.echo import EchoWorker
from zfabric.backends.registry import backend_class
from zfabric.errors import ConfigurationError

MODULES = {
    "breaks_when_imported": "raise ValueError('no device')",
    "is_no_python": "def",
    "lacks_something": "import a_module_that_nobody_has",
    "has_classes": "from zfabric import BaseModelWorker\nclass Half(BaseModelWorker): pass\nclass Other: pass\nnumber = 5",
}


def test_names_and_paths() -> None:
    assert backend_class("echo") is backend_class("zfabric.backends.echo:EchoWorker") is EchoWorker


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "neither one of"),
        ("breaks_when_imported:Backend", "ValueError: no device"),
        ("is_no_python:Backend", "SyntaxError"),
        ("lacks_something:Backend", "a_module_that_nobody_has"),
        ("no_such_module:Backend", "no_such_module"),
        (":Backend", "cannot be imported"),
        (".relative:Backend", "cannot be imported"),
        ("has_classes:Missing", "not a subclass"),
        ("has_classes:Other", "not a subclass"),
        ("has_classes:number", "not a subclass"),
        ("has_classes:Half", "does not implement load"),
        ("has_classes:", "not a subclass"),
    ],
)
def test_what_is_no_backend_is_an_error_that_says_why(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, text in MODULES.items():
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigurationError, match=why):
        backend_class(name)
