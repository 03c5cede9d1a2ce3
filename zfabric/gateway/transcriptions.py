"""OpenAI's /v1/audio (https://platform.openai.com/docs/api-reference/audio): what is said, written down or translated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from msgspec import Struct

from zfabric.client.results import Completion
from zfabric.errors import FabricError, ParameterRangeError, RequestError, UnsupportedParameterError
from zfabric.gateway import sse
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.multipart import fields_of
from zfabric.limits import SOUNDS_DECODED_AT_ONCE
from zfabric.sounds import HEARS_SECONDS, Piece, pieces_of
from zfabric.wire.payloads import Delta

#: Forms of answers that need no timestamps.
_FORMATS: Final = ("json", "text")
_TEXTS: Final = ("model", "prompt", "response_format", "language")
#: To decode a long sound takes seconds of a processor, in which other callers are answered.
_DECODERS: Final = ThreadPoolExecutor(SOUNDS_DECODED_AT_ONCE, thread_name_prefix="gateway-sounds")
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
    """Answer a call: one request to the fabric for each piece of a sound, all of them at once.

    Args:
        task: "transcribe" or "translate".

    Raises:
        RequestError: The form is none, or lacks a field.
        UnsupportedParameterError: It has another one.
        ParameterRangeError: A value is of a wrong kind.
        TooLargeError: The file is too large.
        UnsupportedOperationError: It is no WAV, and the extra "audio" is not installed.
    """
    request = audio_request(fields_of(call.headers.get(b"content-type", b""), call.body), task)
    call.check_model(request.model)
    sounds = await _pieces(call, request)
    asks = [Ask(request.model, None, audio_options(request, task, sound)) for sound in sounds]
    kind = b"text/plain; charset=utf-8" if request.response_format == "text" else b"application/json"
    await answer(call, asks, AudioWording(request), stream=request.stream, kind=kind)


async def _pieces(call: Call, request: AudioRequest) -> list[bytes]:
    """What a sound is sent as: in pieces where the model says how long those may be, as it is otherwise."""
    model = await call.fabric.model(request.model)
    longest = model.details.get(HEARS_SECONDS) if model is not None else None
    if not isinstance(longest, (int, float)) or longest <= 0:
        return [request.file]
    cut = partial(pieces_of, request.file, longest)
    return [piece.data for piece in await call.unless_left(_off_the_loop(cut))]


async def _off_the_loop(cut: Callable[[], list[Piece]]) -> list[Piece]:
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, cut)


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


def audio_options(request: AudioRequest, task: str, sound: bytes) -> dict[str, Any]:
    """The options of `AsyncClient.stream`, for one piece."""
    parts: list[dict[str, Any]] = [{"type": "audio", "audio": sound}]
    if request.prompt:
        parts.append({"type": "text", "text": request.prompt})
    extra = {"task": task, **({"language": request.language} if request.language else {})}
    message = {"role": "user", "content": parts}
    return {"messages": [message], "temperature": request.temperature, "extra": extra}


class AudioWording:
    """How an answer reads, as a stream and whole: the texts of all pieces, one after the other. The blank that a model begins its
    texts with is left out of the first."""

    def __init__(self, request: AudioRequest) -> None:
        self._request = request
        self._begun = False
        #: The piece that is told now, what has come of those behind it, and which have ended.
        self._told = 0
        self._later: dict[int, str] = {}
        self._ended: set[int] = set()

    def delta(self, position: int, delta: Delta) -> bytes:
        self._later[position] = self._later.get(position, "") + delta.text
        if delta.finish_reason is not None:
            self._ended.add(position)
        text = self._next()
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return sse.event({"type": "transcript.text.delta", "delta": text}) if text else b""

    def _next(self) -> str:
        """What may be told by now."""
        text = self._later.pop(self._told, "")
        while self._told in self._ended:
            self._told += 1
            text += self._later.pop(self._told, "")
        return text

    def ending(self, completions: list[Completion]) -> bytes:
        return sse.event({"type": "transcript.text.done", **self._said(completions)})

    def failure(self, error: FabricError) -> bytes:
        return sse.failure(error)

    def whole(self, completions: list[Completion]) -> bytes:
        said = self._said(completions)
        return said["text"].encode() if self._request.response_format == "text" else sse.encode(said)

    def _said(self, completions: list[Completion]) -> dict[str, Any]:
        heard = sum(one.usage.prompt_tokens for one in completions)
        written = sum(one.usage.completion_tokens for one in completions)
        usage = {"type": "tokens", "input_tokens": heard, "output_tokens": written, "total_tokens": heard + written}
        return {"text": "".join(one.text for one in completions).lstrip(), "usage": usage}


ENDPOINTS: Final = (
    Endpoint("POST", "/v1/audio/transcriptions", partial(audio, task="transcribe")),
    Endpoint("POST", "/v1/audio/translations", partial(audio, task="translate")),
)
