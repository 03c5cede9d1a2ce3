"""/v1/audio/transcriptions and /v1/audio/translations."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from transformers import AutoTokenizer

from tests.backends.speaking import save_whisper, transcribed
from tests.gateway.conftest import gateway
from tests.voices import RATE, coded, voice, wav
from zfabric.backends.echo import EchoWorker
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import RequestError
from zfabric.gateway.multipart import fields_of
from zfabric.gateway.transcriptions import AudioWording, audio_request
from zfabric.sounds import pieces_of, samples_of
from zfabric.wire.payloads import Delta

FORM = b"multipart/form-data; boundary=xyz"


async def test_openais_client_has_sounds_written_down_and_translated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_whisper(tmp_path)
    options = TransformersOptions(model=str(directory), model_names=("whisper",), dtype="float32", device="cpu")
    data = wav(voice(3))
    heard = samples_of(data, RATE, 2)

    tokenizer = AutoTokenizer.from_pretrained(directory)

    def raw(samples: np.ndarray, **asked: Any) -> str:
        return str(tokenizer.decode(transcribed(directory, samples, **asked), skip_special_tokens=True))

    def expected(**asked: Any) -> str:
        return raw(heard, **asked).lstrip()

    async with gateway(ModelWorker(options)) as served:
        sound: Any = {"model": "whisper", "file": ("a.wav", data)}
        audio = served.openai.audio
        plain = await audio.transcriptions.create(**sound, language="de", temperature=0)
        assert plain.text == expected(language="de", task="transcribe")
        assert plain.usage is not None
        assert plain.usage.type == "tokens"
        assert plain.usage.input_tokens == 100
        prompted = await audio.transcriptions.create(**sound, prompt="As said before", response_format="text")
        assert str(prompted) == expected(prompt="As said before", task="transcribe")
        with warnings.catch_warnings():
            # OpenAI's client says that its own service is to end this call.
            warnings.simplefilter("ignore", DeprecationWarning)
            translated = await audio.translations.create(**sound)
        assert translated.text == expected(task="translate") != plain.text
        events = [event async for event in await audio.transcriptions.create(**sound, language="de", stream=True)]
        assert events[-1].type == "transcript.text.done"
        assert events[-1].text == plain.text
        assert len(events) > 3
        assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == plain.text
        # The library's own client sends the same.
        message = {"role": "user", "content": [{"type": "audio", "audio": data}]}
        own = await served.fabric.chat("whisper", [message], extra={"language": "de"}, temperature=0)
        assert own.text.lstrip() == plain.text
        long = wav(voice(4, 7.0, 8_000), 8_000)
        parts = [samples_of(piece.data, RATE, 2) for piece in pieces_of(long, 2)]
        assert len(parts) > 3
        texts = [raw(part, language="de", task="transcribe") for part in parts]
        assert len(set(texts)) > 2
        spoken: Any = {"model": "whisper", "file": ("a.wav", long), "language": "de"}
        whole = await audio.transcriptions.create(**spoken)
        assert whole.text == "".join(texts).lstrip()
        assert whole.usage.type == "tokens"
        assert whole.usage.input_tokens == 100 * len(parts)
        events = [event async for event in await audio.transcriptions.create(**spoken, stream=True)]
        assert events[-1].text == whole.text
        assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == whole.text
        # Another format is heard as what it decodes to; the worker itself reads it as well.
        mp3 = coded(voice(3), RATE, "mp3", "libmp3lame")
        other = await audio.transcriptions.create(model="whisper", file=("a.mp3", mp3), language="de")
        (piece,) = pieces_of(mp3, 2)
        assert other.text == raw(samples_of(piece.data, RATE, 2), language="de", task="transcribe").lstrip()
        message = {"role": "user", "content": [{"type": "audio", "audio": mp3}]}
        assert (await served.fabric.chat("whisper", [message], extra={"language": "de"}, temperature=0)).text
        with pytest.raises(openai.BadRequestError, match="at most 1800 s"):
            await audio.transcriptions.create(model="whisper", file=("a.wav", wav(np.zeros(1_801 * 1_000), 1_000)))
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(openai.BadRequestError, match=r"zfabric\[audio\]") as missing:
            await audio.transcriptions.create(model="whisper", file=("a.mp3", mp3))
        assert missing.value.code == "unsupported_operation"
        monkeypatch.undo()
        with pytest.raises(openai.BadRequestError, match="cannot be read"):
            await audio.transcriptions.create(model="whisper", file=("a.mp3", b"ID3 and no more"))
        with pytest.raises(openai.BadRequestError, match="klingon"):
            await audio.transcriptions.create(**sound, language="klingon")


def test_pieces_are_told_in_their_order() -> None:
    wording = AudioWording(audio_request([("file", b""), ("model", b"m")], "transcribe"))
    told = [
        wording.delta(position, Delta(text=text, finish_reason="stop" if last else None))
        for position, text, last in (
            (1, " c", False), (0, " a", False), (2, " e", True), (1, "d", True), (0, " b", False), (0, "", True), (3, " f", True),
        )
    ]  # fmt: skip
    assert [json.loads(event.partition(b"data: ")[2])["delta"] if event else "" for event in told] == [
        "", "a", "", "", " b", " cd e", " f",
    ]  # fmt: skip


async def test_what_is_not_served_is_refused_by_name() -> None:
    async with gateway(EchoWorker(), body_limit=20_000) as served:
        sound: Any = {"model": "echo", "file": ("a.wav", b"RIFF")}
        create = served.openai.audio.transcriptions.create
        with pytest.raises(openai.BadRequestError, match="no timestamps") as found:
            await create(**sound, response_format="srt")
        assert found.value.param == "response_format"
        with pytest.raises(openai.BadRequestError, match="timestamp_granularities") as unknown:
            await create(**sound, timestamp_granularities=["word"])
        assert unknown.value.code == "unsupported_parameter"
        with pytest.raises(openai.NotFoundError):
            await create(model="nobody", file=("a.wav", b"RIFF"))
        with pytest.raises(openai.APIStatusError) as large:
            await create(model="echo", file=("a.wav", bytes(30_000)))
        assert large.value.status_code == 413
        # A model that reads text alone hears nothing.
        with pytest.raises(openai.BadRequestError, match="audio"):
            await create(**sound)
        async with httpx.AsyncClient(base_url=served.url, trust_env=False) as client:
            path = "/v1/audio/transcriptions"
            for content, kind in ((b"{}", b"application/json"), (b"--xyz\r\n", FORM), (b"--xyz--\r\n", FORM)):
                reply = await client.post(path, content=content, headers={"content-type": kind.decode()})
                assert reply.status_code == 400
                assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_form_holds_bytes_as_they_are() -> None:
    value = bytes(range(256)) + b"\r\n--xy\r\n\r\n--"
    head = b'Content-Disposition: form-data; filename="a\\"b.wav"; name="file"\r\nContent-Type: audio/wav'
    body = (
        b"--xyz\r\n" + head + b"\r\n\r\n" + value + b'\r\n--xyz\r\nCONTENT-DISPOSITION: form-data; name="model"\r\n\r\n'
    )
    body += b"m\r\n--xyz--\r\n"
    assert fields_of(FORM, body) == [("file", value), ("model", b"m")]


def test_a_form_has_bounds() -> None:
    def form(*fields: bytes) -> bytes:
        return b"".join(b"--xyz\r\n" + field + b"\r\n\r\nv\r\n" for field in fields) + b"--xyz--\r\n"

    head = b'Content-Disposition: form-data; name="a"'
    assert fields_of(FORM, form(*[head] * 64)) == [("a", b"v")] * 64
    for fields in ([head] * 65, [head + b"\r\nX: y" * 8], [head + b"; x=" + b"y" * 1_024]):
        with pytest.raises(RequestError, match="form"):
            fields_of(FORM, form(*fields))


@pytest.mark.parametrize("body", [b"", b"--xyz", b"--abc--", b"--xyz\r\nX: y\r\n\r\nz\r\n--xyz--", b"--xyz\r\n" * 70])
def test_what_is_no_form_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="form"):
        fields_of(FORM, body)
