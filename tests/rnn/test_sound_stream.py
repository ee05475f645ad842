"""Streams of sound: the features equal those of the whole recording, and every bad input is refused."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton.rnn.data.audio import BANDS, RATE, LogMel, write_wav
from str_triton.rnn.data.sound_stream import LogMelStream, pieces
from tests.messages import holds


def noise(count: int) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 3000).to(torch.int16)


@pytest.mark.parametrize("lengths", [[50_000], [1] * 700 + [159, 160, 161, 400, 3000], [1600] * 20, [7, 7, 7]])
def test_features_are_those_of_the_whole_recording(lengths: list[int]) -> None:
    sound, stream = noise(sum(lengths)), LogMelStream()
    parts = [stream(piece) for piece in sound.split(lengths)]
    assert all(part.shape[1] == BANDS for part in parts)
    frames = torch.cat(parts)
    whole = LogMel()(sound[None])[0] if len(sound) > 400 else torch.empty(1, BANDS)
    # A frame ends 360 samples after it begins; the last one may end with 40 zeros.
    assert len(frames) == max(0, (len(sound) + 40 - 400) // 160 + 1)
    assert len(whole) - 1 <= len(frames) <= len(whole)
    torch.testing.assert_close(frames, whole[: len(frames)], rtol=0, atol=1e-5)


def test_a_wav_file_and_bare_samples_are_the_same(tmp_path: Path) -> None:
    sound = noise(5000)
    write_wav(tmp_path / "x.wav", sound.numpy())
    content = (tmp_path / "x.wav").read_bytes()
    read = list(pieces(io.BytesIO(content), "x", None))
    assert torch.equal(torch.cat(read), sound)
    assert [len(piece) for piece in read] == [1600, 1600, 1600, 200]
    assert torch.equal(torch.cat(list(pieces(io.BytesIO(sound.numpy().tobytes() + b"x"), "x", RATE))), sound)
    trailing = content + b"LIST" + struct.pack("<I", 4) + b"abcd"
    assert torch.equal(torch.cat(list(pieces(io.BytesIO(trailing), "x", None))), sound)
    for size in (0, 0x7FFFF000, 0x7FFFFF00, 0xFFFFFFFF):  # sizes that a crash, sox, arecord and ffmpeg leave
        endless = content[:4] + bytes(4) + content[8:40] + struct.pack("<I", size) + content[44:]
        assert torch.equal(torch.cat(list(pieces(io.BytesIO(endless), "x", None))), sound)


def test_a_truncated_file_is_heard_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wav(tmp_path / "x.wav", noise(5000).numpy())
    content = (tmp_path / "x.wav").read_bytes()[:-2000]
    assert sum(map(len, pieces(io.BytesIO(content), "x.wav", None))) == 4000
    assert holds(capsys.readouterr().err, "warning: x.wav .. truncated .. 2000 bytes")


def test_a_rate_below_the_networks_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate, said in ((8000, "warning: x .. 8,000 Hz .. 16,000 Hz .. above 4,000 Hz"), (RATE, ""), (48_000, "")):
        assert list(pieces(io.BytesIO(noise(5000).numpy().tobytes()), "x", rate))
        error = capsys.readouterr().err
        assert holds(error, said)
        assert error.count("\n") == bool(said)


def wav(channels: int = 1, rate: int = RATE, bits: int = 16, code: int = 1) -> bytes:
    form = struct.pack(
        "<HHIIHH", code, channels, rate, rate * channels * bits // 8 & 0xFFFFFFFF, channels * bits // 8 & 0xFFFF, bits
    )
    sound = np.zeros(1000, "<i2").tobytes()
    return b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(sound)) + sound


def tone(frequency: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(rate // 2) / rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize(("bits", "code", "channels"), [(16, 1, 1), (16, 1, 2), (8, 1, 1), (24, 1, 1), (32, 3, 3)])
def test_sound_of_any_form_becomes_samples_at_16_khz(rate: int, bits: int, code: int, channels: int) -> None:
    """A tone of 1 kHz; the channels hold multiples of it."""
    weights = {1: [1.0], 2: [1.0, 0.0], 3: [1.0, -0.5, 1.0]}[channels]
    samples = tone(1000.0, rate)[:, None] * weights
    if code == 3:
        stored = samples.astype("<f4").tobytes()
    elif bits == 8:
        stored = np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    elif bits == 24:
        stored = np.round(samples * 2**23).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    else:
        stored = np.round(samples * 2**15).astype("<i2").tobytes()
    header = wav(channels, rate, bits, code)[:40] + struct.pack("<I", len(stored))
    found = torch.cat(list(pieces(io.BytesIO(header + stored), "x", None)))
    assert (found.dtype, len(found)) == (torch.int16, 8000)
    expected = tone(1000.0, RATE) * np.mean(weights)
    error = np.abs(found.numpy() / 32768 - expected)[200:-200].max()
    assert error < (0.01 if bits == 8 else 2e-4)


def test_raw_samples_of_any_rate() -> None:
    sound = np.round(tone(1000.0, 48_000) * 2**15).astype("<i2").tobytes()
    found = torch.cat(list(pieces(io.BytesIO(sound), "x", 48_000))).numpy() / 32768
    assert np.abs(found - tone(1000.0, RATE))[200:-200].max() < 2e-4


@pytest.mark.parametrize(
    ("content", "rate", "message"),
    [
        (b"", None, "x is empty"),
        (b"", RATE, "x .*empty.* no sound"),
        (b"hello, this is text", None, "x .*not a WAV file.* --rate 16000"),
        (wav()[:20], None, "x .*truncated"),
        (wav()[:44], None, "x .*empty.* no sound"),
        (b"\0\0", 999, "--rate 999: .*1,000 to 768,000"),
        (wav(), 8000, "x .*WAV file.* --rate 8000"),
        (wav(bits=12), None, "x.* format 1 .*12 bits"),
        (wav(rate=0), None, " 0 Hz.* 1,000 to 768,000"),
        (wav(channels=65_535), None, "65,535 channels.* 1 to 64"),
        (wav(bits=8, code=7), None, r"x.* 7 \(mu-law\).* 8 bits"),
    ],
)
def test_other_sound_is_refused(content: bytes, rate: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(pieces(io.BytesIO(content), "x", rate))
