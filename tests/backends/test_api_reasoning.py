"""OpenAI's models that think before they answer, and Azure's ways, with a fake server: exactly what is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.backends.faulty import Announced, api_worker, ask, faulty, status, usual
from zfabric.errors import RequestError, UnsupportedParameterError

UNSUPPORTED = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "type": "invalid_request_error",
    "param": "max_tokens",
    "code": "unsupported_parameter",
}
FIXED = {
    "message": "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is supported.",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": "unsupported_value",
}


def refused(error: dict[str, Any]) -> Any:
    return status(400, json.dumps({"error": error}))


async def test_a_model_that_thinks_is_bounded_by_another_name(tmp_path: Path) -> None:
    async with faulty(usual()) as server, api_worker(tmp_path, server.url, reasoning=True) as worker:
        deltas = await ask(worker, max_new_tokens=9, seed=1, stop=("x",))
        assert deltas[0].text == "fine"
        body = server.asked[0].body
        assert (body["max_completion_tokens"], body["seed"]) == (9, 1)
        assert not body.keys() & {"max_tokens", "temperature", "top_p", "stop"}
        (info,) = worker._infos()
        chat = {"tools", "tool_choice", "parallel_tool_calls", "response_format"}
        assert set(info.parameters or ()) == {"max_new_tokens", "stop", "seed", *chat}
        with pytest.raises(UnsupportedParameterError, match="'temperature'"):
            await ask(worker, temperature=0.2)


async def test_it_is_found_out_once(tmp_path: Path) -> None:
    async with faulty(refused(UNSUPPORTED), usual()) as server, api_worker(tmp_path, server.url) as worker:
        for _ in range(2):
            deltas = await ask(worker, max_new_tokens=9)
            assert "".join(delta.text for delta in deltas) == "fine"
        bounds = [{key: value for key, value in asked.body.items() if "max" in key} for asked in server.asked]
        assert bounds == [{"max_tokens": 9}, {"max_completion_tokens": 9}, {"max_completion_tokens": 9}]
        assert isinstance(worker.steps, Announced)
        assert worker.steps.models == [["m"]]
        (info,) = worker._infos()
        assert "temperature" not in (info.parameters or ())


async def test_a_temperature_that_it_does_not_take_is_refused_by_name(tmp_path: Path) -> None:
    async with faulty(refused(FIXED)) as server, api_worker(tmp_path, server.url) as worker:
        for _ in range(2):
            with pytest.raises(UnsupportedParameterError, match="'temperature' is not supported by model 'm'"):
                await ask(worker, temperature=0.2)
        assert len(server.asked) == 1


async def test_another_error_teaches_nothing(tmp_path: Path) -> None:
    wrong = {"message": "max_tokens is too large: 9000.", "param": "max_tokens"}
    async with faulty(refused(wrong)) as server, api_worker(tmp_path, server.url) as worker:
        with pytest.raises(RequestError, match="too large"):
            await ask(worker, max_new_tokens=9_000)
        assert len(server.asked) == 1


async def test_azure_has_a_version_and_a_key_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_KEY", "azure-secret")
    async with faulty(usual()) as server:
        url = f"{server.url}/openai/deployments/mine"
        keys = {"api_version": "2024-10-21", "token_env": "AZURE_KEY"}
        async with api_worker(tmp_path, url, **keys) as worker:
            await ask(worker)
        head = server.asked[0].head
        assert head.startswith("POST /openai/deployments/mine/chat/completions?api-version=2024-10-21 HTTP/1.1")
        assert "api-key: azure-secret" in head
        assert "uthorization" not in head
