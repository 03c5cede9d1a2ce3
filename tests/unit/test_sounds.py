"""Sounds: files of them made into samples, and cut into pieces."""

from __future__ import annotations

import io
import struct
import sys
from typing import Any

import av
import numpy as np
import pytest

from tests.voices import RATE, coded, voice, wav
from zfabric.errors import RequestError, TooLargeError, UnsupportedOperationError
from zfabric.limits import SOUND_BYTES_MAX
from zfabric.sounds import Piece, pieces_of, samples_of
from zfabric.sounds.pieces import cuts
from zfabric.sounds.resampling import resampled


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_numbers_of_any_width_are_read(width: int, channels: int) -> None:
    samples = voice(1, 0.25)
    found = samples_of(wav(samples, width=width, channels=channels), RATE, 1)
    assert np.abs(found - samples).max() < 1.5 * 2.0 ** (1 - 8 * width) + 1e-6


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("size", [4, 8])
def test_floating_samples_are_read(size: int, extensible: bool) -> None:
    samples = voice(1, 0.25)
    kind = 0xFFFE if extensible else 3
    head = struct.pack("<HHIIHH", kind, 1, RATE, RATE * size, size, 8 * size)
    if extensible:
        head += struct.pack("<HHIH", 22, 8 * size, 4, 3) + bytes(14)
    body = samples.astype(f"<f{size}").tobytes()
    # A chunk of an odd size stands between, and is filled up.
    chunks = [(b"fmt ", head), (b"LIST", b"abc"), (b"data", body)]
    inner = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    data = b"RIFF" + struct.pack("<I", 4 + len(inner)) + b"WAVE" + inner
    np.testing.assert_allclose(samples_of(data, RATE, 1), samples, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
def test_any_rate_becomes_the_models(rate: int) -> None:
    # All tones are below half of the lowest rate, so nothing may be lost but at the ends.
    found = resampled(voice(1, 0.5, rate), rate, RATE)
    wanted = voice(1, 0.5, RATE)
    assert abs(len(found) - len(wanted)) <= 1
    count = min(len(found), len(wanted)) - 200
    assert np.abs(found[200:count] - wanted[200:count]).max() < 2e-3


def test_what_a_lower_rate_has_not_is_left_out() -> None:
    high = np.sin(2 * np.pi * 12_000 * np.arange(24_000) / 48_000)
    assert np.abs(resampled(high, 48_000, RATE)[200:-200]).max() < 2e-3


@pytest.mark.parametrize("cut", [0, 4, 12, 20, 40])
def test_broken_files_are_refused(cut: int) -> None:
    with pytest.raises(RequestError, match="sound"):
        samples_of(wav(voice(1, 0.1))[:cut], RATE, 1)


@pytest.mark.parametrize("field", [(22, "<H", 0), (22, "<H", 999), (24, "<I", 3), (24, "<I", 2**31), (34, "<H", 7)])
def test_heads_that_say_the_impossible_are_refused(field: tuple[int, str, int]) -> None:
    data = bytearray(wav(voice(1, 0.1)))
    struct.pack_into(field[1], data, field[0], field[2])
    with pytest.raises(RequestError, match="sound"):
        samples_of(bytes(data), RATE, 1)


FORMATS = [
    ("mp3", "libmp3lame"), ("flac", "flac"), ("ogg", "libopus"), ("webm", "libopus"), ("ipod", "aac"), ("mp4", "aac"),
    ("adts", "aac"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_other_formats_are_decoded(container: str, codec: str) -> None:
    # Codecs add what they begin with, a whole number of samples here, so what is sent is looked for.
    sent, rate = voice(1), 48_000 if codec == "libopus" else 2 * RATE
    found = samples_of(coded(voice(1, 1.0, rate), rate, container, codec), RATE, 2)
    assert found.dtype == np.float32
    assert -RATE // 10 < len(found) - RATE < RATE // 5
    middle = sent[4_000:8_000]
    windows = np.lib.stride_tricks.sliding_window_view(found, len(middle))[3_000:7_000]
    likeness = windows @ middle / np.sqrt((windows**2).sum(axis=1) * np.dot(middle, middle))
    assert likeness.max() > 0.99


def test_channels_are_averaged() -> None:
    mono, stereo = (samples_of(coded(voice(1), RATE, "flac", "flac", channels), RATE, 2) for channels in (1, 2))
    np.testing.assert_allclose(stereo * 2, mono, atol=1e-4)


def test_a_sound_may_change_its_rate() -> None:
    parts = [coded(voice(1, 1.0, rate), rate, "mp3", "libmp3lame") for rate in (44_100, 48_000)]
    found = samples_of(b"".join(parts), RATE, 3)
    assert abs(len(found) - 2 * RATE) < RATE // 5


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_what_is_longer_is_decoded_no_further(container: str, codec: str) -> None:
    data = coded(voice(1, 3.0, 48_000), 48_000, container, codec)
    with pytest.raises(RequestError, match="more than 2 s"):
        samples_of(data, RATE, 2)


def test_what_is_no_sound_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as made:
        stream: Any = made.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        made.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8))))
        made.mux(stream.encode(None))
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    mp3 = coded(voice(1), RATE, "mp3", "libmp3lame")
    for data in (b"", b"no sound", playlist, mp3[:64], file.getvalue()):
        with pytest.raises(RequestError, match=r"cannot be read|no sound in it"):
            samples_of(data, RATE, 2)


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(samples_of(wav(voice(1)), RATE, 2)) == RATE
    with pytest.raises(UnsupportedOperationError, match=r"zfabric\[audio\]"):
        samples_of(b"ID3", RATE, 2)


def test_a_long_sound_is_cut_where_it_is_quiet() -> None:
    sound = np.random.default_rng(0).uniform(-0.9, 0.9, 7 * RATE)
    quiet = [1.95, 3.8, 5.7]
    for seconds in quiet:
        sound[int((seconds - 0.06) * RATE) : int((seconds + 0.06) * RATE)] *= 0.01
    data = wav(sound)
    pieces = pieces_of(data, 2)
    assert [piece.start for piece in pieces] == pytest.approx([0, *quiet], abs=0.02)
    assert all(0 < piece.seconds <= 2 for piece in pieces)
    parts = [samples_of(piece.data, RATE, 2) for piece in pieces]
    assert [len(part) / RATE for part in parts] == [piece.seconds for piece in pieces]
    # Nothing is lost, and nothing is there twice.
    np.testing.assert_array_equal(np.concatenate(parts), samples_of(data, RATE, 7))


def test_a_sound_without_pauses_is_cut_all_the_same() -> None:
    for sound in (np.zeros(10 * RATE), np.ones(10 * RATE), voice(1, 10)):
        places = cuts(sound.astype(np.float32), RATE, 2)
        lengths = np.diff([0, *places, len(sound)])
        assert (lengths <= 2 * RATE).all()
        assert (lengths[:-1] >= 1.8 * RATE).all()
    # Where all is as quiet, the pieces are as long as may be.
    assert cuts(np.zeros(5 * RATE, dtype=np.float32), RATE, 2)[0] > 1.94 * RATE
    assert cuts(np.zeros(2 * RATE, dtype=np.float32), RATE, 2) == []
    assert all(np.diff([0, *cuts(np.ones(99, dtype=np.float32), RATE, 0.001), 99]) <= 16)


def test_one_piece_is_sent_as_what_anybody_reads() -> None:
    data = wav(voice(1, 1.0, 8_000), 8_000)
    assert pieces_of(data, 2) == [Piece(0.0, 1.0, data)]
    (piece,) = pieces_of(coded(voice(1), RATE, "flac", "flac"), 2)
    np.testing.assert_allclose(samples_of(piece.data, RATE, 2), voice(1), atol=1e-4)


def test_sounds_have_bounds() -> None:
    with pytest.raises(TooLargeError, match=str(SOUND_BYTES_MAX)):
        pieces_of(bytes(SOUND_BYTES_MAX + 1), 2)
    with pytest.raises(RequestError, match="at most 3 s"):
        pieces_of(wav(voice(1, 4.0)), 2, seconds_max=3)
    with pytest.raises(RequestError, match="more than 3 s"):
        pieces_of(coded(voice(1, 4.0), RATE, "flac", "flac"), 2, seconds_max=3)
