"""OpenAI's /v1/models (https://platform.openai.com/docs/api-reference/models)."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote

from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.clock import created
from zfabric.gateway.sse import encode
from zfabric.wire.status import ModelStatus

#: The API wants a time of creation, of which a fabric knows nothing: models are as old as this process.
_STARTED: Final = created()


async def models(call: Call) -> None:
    """All models that this caller may ask for, aliases among them."""
    rows = [row for model in await call.client.models() for row in model_objects(model)]
    if call.key is not None and call.key.models is not None:
        rows = [row for row in rows if row["id"] in call.key.models]
    await call.response.whole(200, encode({"object": "list", "data": rows}))


async def model(call: Call) -> None:
    """One of them. A name may have slashes, as it stands or quoted."""
    name = call.check_model(unquote(call.path))
    found = await call.client.model_details(name)
    row = next((row for row in model_objects(found) if row["id"] == name), model_objects(found)[0])
    await call.response.whole(200, encode(row))


ENDPOINTS: Final = (Endpoint("GET", "/v1/models", models), Endpoint("GET", "/v1/models/", model))


def model_objects(model: ModelStatus) -> list[dict[str, Any]]:
    """A model under each of its names. `root`, `max_model_len` are vLLM's, `capabilities` is the fabric's own."""
    shared = {
        "object": "model",
        "created": _STARTED,
        "owned_by": "zfabric",
        "root": model.name,
        "max_model_len": model.context_length or None,
        "capabilities": model.capabilities,
    }
    return [{"id": name, **shared} for name in (model.name, *model.aliases)]
