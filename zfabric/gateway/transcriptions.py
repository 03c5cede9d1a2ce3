"""OpenAI's /v1/audio (https://platform.openai.com/docs/api-reference/audio): what is said, written down or translated."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from msgspec import Struct

from zfabric.client.results import Completion
from zfabric.errors import FabricError, ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.gateway import sse
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.multipart import fields_of
from zfabric.wire.payloads import Delta

#: Forms of answers that need no timestamps.
_FORMATS: Final = ("json", "text")
_TEXTS: Final = ("model", "prompt", "response_format", "language")
_TRUTHS: Final = {b"true": True, b"1": True, b"false": False, b"0": False}


class AudioRequest(Struct, kw_only=True):
    """The form's fields.

    Attributes:
        file: Bytes of the sound.
        prompt: What was said before it.
        temperature: As for texts; OpenAI's of 0 where none is given.
        language: What is spoken; the model finds it out where none is given. Not for translations, as OpenAI has it.
    """

    file: bytes
    model: str
    prompt: str | None = None
    response_format: str = "json"
    temperature: float = 0.0
    language: str | None = None
    stream: bool = False


async def audio(call: Call, task: str) -> None:
    """Answer a call: one request to the fabric.

    Args:
        task: "transcribe" or "translate".

    Raises:
        RequestError: The form is none, or lacks a field.
        UnsupportedParameterError: It has another one.
        ParameterRangeError: A value is of a wrong kind.
    """
    request = audio_request(fields_of(call.headers.get(b"content-type", b""), call.body), task)
    call.check_model(request.model)
    ask = Ask(request.model, None, audio_options(request, task))
    kind = b"text/plain; charset=utf-8" if request.response_format == "text" else b"application/json"
    await answer(call, [ask], AudioWording(request), stream=request.stream, kind=kind)


def audio_request(fields: list[tuple[str, bytes]], task: str) -> AudioRequest:
    """A request of a form's fields. Raises: as of `audio`."""
    given: dict[str, Any] = {}
    for name, value in fields:
        if name in given:
            raise RequestError(f"{name!r} is given twice", parameter=name)
        given[name] = value if name == "file" else _value(name, value, task)
    for name in ("file", "model"):
        if name not in given:
            raise RequestError(f"{name!r} is missing", parameter=name)
    request = AudioRequest(**given)
    if request.response_format not in _FORMATS:
        raise ParameterRangeError(
            f"response_format is {request.response_format!r}, it must be json or text: no timestamps are made",
            parameter="response_format",
            value=request.response_format,
        )
    if request.stream and request.response_format != "json":
        raise RequestError("stream is given beside response_format, whose events are JSON", parameter="response_format")
    return request


def _value(name: str, value: bytes, task: str) -> Any:
    if name in _TEXTS and not (name == "language" and task == "translate"):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise RequestError(f"{name!r} is no text in UTF-8", parameter=name) from None
    told = value[:64].decode("utf-8", "replace")
    if name == "temperature":
        try:
            return float(told)
        except ValueError:
            raise ParameterRangeError(f"{name}: {told!r} is no number", parameter=name, value=told) from None
    if name == "stream" and task == "transcribe":
        if value.lower() not in _TRUTHS:
            raise ParameterRangeError(f"{name}: {told!r} is not true or false", parameter=name, value=told)
        return _TRUTHS[value.lower()]
    raise UnsupportedParameterError(f"{name!r} is not a parameter of this call", parameter=name)


def audio_options(request: AudioRequest, task: str) -> dict[str, Any]:
    """The options of `AsyncClient.stream`."""
    parts: list[dict[str, Any]] = [{"type": "audio", "audio": request.file}]
    if request.prompt:
        parts.append({"type": "text", "text": request.prompt})
    extra = {"task": task, **({"language": request.language} if request.language else {})}
    message = {"role": "user", "content": parts}
    return {"messages": [message], "temperature": request.temperature, "extra": extra}


class AudioWording:
    """How an answer reads, as a stream and whole. The blank that a model begins its texts with is left out."""

    def __init__(self, request: AudioRequest) -> None:
        self._request = request
        self._begun = False

    def delta(self, position: int, delta: Delta) -> bytes:
        text = delta.text if self._begun else delta.text.lstrip()
        self._begun = self._begun or bool(text)
        return sse.event({"type": "transcript.text.delta", "delta": text}) if text else b""

    def ending(self, completions: list[Completion]) -> bytes:
        return sse.event({"type": "transcript.text.done", **self._said(completions)})

    def failure(self, error: FabricError) -> bytes:
        return sse.failure(error)

    def whole(self, completions: list[Completion]) -> bytes:
        said = self._said(completions)
        return said["text"].encode() if self._request.response_format == "text" else sse.encode(said)

    def _said(self, completions: list[Completion]) -> dict[str, Any]:
        (completion,) = completions
        usage = completion.usage
        counted = {
            "type": "tokens", "input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }  # fmt: skip
        return {"text": completion.text.lstrip(), "usage": counted}


ENDPOINTS: Final = (
    Endpoint("POST", "/v1/audio/transcriptions", partial(audio, task="transcribe")),
    Endpoint("POST", "/v1/audio/translations", partial(audio, task="translate")),
)
