"""`llm`, a command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, Served, run


@pytest.fixture
def home(served: Served, tmp_path: Path) -> str:
    """Its directory, with the model in it (https://llm.datasette.io/en/stable/other-models.html)."""
    entry = {"model_id": "local", "model_name": MODEL, "api_base": served.url, "api_key_name": "local"}
    # YAML takes JSON.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    (tmp_path / "keys.json").write_text(json.dumps({"local": "none"}))
    return str(tmp_path)


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_a_question_a_conversation_and_a_log(home: str, flags: list[str]) -> None:
    options = ["-m", "local", "-o", "temperature", "0", "-o", "max_tokens", "24", *flags]
    assert "Paris" in run("llm", *options, "What is the capital of France?", LLM_USER_PATH=home)
    assert run("llm", *options, "-c", "And of Italy?", LLM_USER_PATH=home).strip()
    logged = json.loads(run("llm", "logs", "--json", "-n", "0", LLM_USER_PATH=home))
    assert len(logged) == 2
    assert {entry["conversation_id"] for entry in logged} == {logged[0]["conversation_id"]}
