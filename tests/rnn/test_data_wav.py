"""WAV files: all formats that are read, and all that are refused."""

import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from str_triton.rnn.data.audio import RATE, mono
from str_triton.rnn.data.wav import parse_wav, read_header, read_wav, write_wav

GUID = bytes.fromhex("000000001000800000aa00389b71")
NO_SIZE = (0, 0x7FFFF000, 0x7FFFFF00, 0xFFFFFFFF)  # sizes of the data chunk that a crash, sox, arecord and ffmpeg leave


def chunk(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(content) if size is None else size) + content + b"\0" * (len(content) % 2)


def form(bits: int = 16, channels: int = 1, rate: int = RATE, code: int = 1, frame: int | None = None) -> bytes:
    frame = channels * bits // 8 if frame is None else frame
    content = struct.pack("<HHIIHH", code, channels, rate, rate * frame & 0xFFFFFFFF, frame, bits)
    return content + (struct.pack("<HHIH", 22, bits, 0, 1) + GUID if code == 0xFFFE else b"")


def riff(*chunks: bytes, size: int | None = None, kind: bytes = b"RIFF") -> bytes:
    content = b"WAVE" + b"".join(chunks)
    return kind + struct.pack("<I", len(content) if size is None else size) + content


def wav(content: bytes, **options: int) -> bytes:
    """Return the bytes of a WAV file."""
    return riff(chunk(b"fmt ", form(**options)), chunk(b"LIST", b"abc"), chunk(b"data", content))


def test_a_written_file_is_read_back_and_by_python_too(tmp_path: Path):
    samples = np.array([0, 1, -1, 32767, -32768], np.int16)
    write_wav(tmp_path / "a.wav", samples, 8000)
    got, rate = read_wav(tmp_path / "a.wav")
    assert (got.tolist(), rate, got.dtype) == ([[s] for s in samples.tolist()], 8000, np.int16)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (1, 8000, 2)
        assert file.readframes(9) == samples.tobytes()


def test_python_s_stereo_file_is_read():
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(2)
        out.setframerate(44100)
        out.setsampwidth(2)
        out.writeframes(np.array([[1, 3], [5, 9]], np.int16).tobytes())
    samples, rate = parse_wav(file.getvalue(), "x")
    assert (samples.tolist(), rate) == ([[1, 3], [5, 9]], 44100)
    assert mono(samples, RATE).tolist() == [2, 7]


@pytest.mark.parametrize(
    ("content", "bits", "code"),
    [
        (bytes([128, 192, 0]), 8, 1),
        (np.array([0, 16384, -32768], "<i2").tobytes(), 16, 1),
        (np.array([0, 16384, -32768], "<i2").tobytes(), 16, 0xFFFE),
        (b"\xff\x00\x00" + b"\x00\x00\x40" + b"\x00\x00\x80", 24, 1),
        (np.array([99, 2**30, -(2**31)], "<i4").tobytes(), 32, 1),
        (np.array([0, 0.5, -1.5], "<f4").tobytes(), 32, 3),
        (np.array([0, 0.5, -1.0], "<f8").tobytes(), 64, 3),
    ],
)
def test_every_depth_becomes_16_bits(content: bytes, bits: int, code: int):
    samples, _ = parse_wav(wav(content, bits=bits, code=code), "x")
    assert (samples[:, 0].tolist(), samples.dtype) == ([0, 16384, -32768], np.int16)


SOUND = np.arange(1, 5, dtype="<i2").tobytes()
FORM = chunk(b"fmt ", form())
FLOATS = {"bits": 32, "code": 3}


@pytest.mark.parametrize("size", NO_SIZE)
@pytest.mark.parametrize("whole", [0, 36, 0x7FFFF024, 0xFFFFFFFF])
def test_a_header_without_a_size_means_all_that_follows(size: int, whole: int):
    samples, _ = parse_wav(riff(FORM, chunk(b"data", SOUND, size), size=whole), "x")
    assert samples[:, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("whole", [0, 1, 20, 4000, 0xFFFFFFFF])
def test_a_size_of_the_whole_file_that_lies_changes_nothing(whole: int):
    content = riff(FORM, chunk(b"data", SOUND), chunk(b"LIST", b"more"), size=whole)
    assert parse_wav(content, "x")[0][:, 0].tolist() == [1, 2, 3, 4]


def test_an_empty_chunk_of_sound_in_front_of_others_is_empty():
    with pytest.raises(ValueError, match="x is empty"):
        parse_wav(riff(FORM, chunk(b"data", b""), chunk(b"LIST", b"abcd")), "x")


@pytest.mark.parametrize("kind", [b"RF64", b"BW64"])
@pytest.mark.parametrize("size", [8, 0, 2**64 - 1])
def test_files_that_may_be_larger_than_4_gib(kind: bytes, size: int):
    sizes = chunk(b"ds64", struct.pack("<QQQI", 100, size, 4, 0))
    trailing = chunk(b"LIST", b"abcd") if size == 8 else b""
    content = riff(sizes, FORM, chunk(b"data", SOUND, 0xFFFFFFFF), trailing, size=0xFFFFFFFF, kind=kind)
    assert parse_wav(content, "x")[0][:, 0].tolist() == [1, 2, 3, 4]


def test_odd_chunks_and_a_frame_that_is_cut_short():
    content = riff(chunk(b"JUNK", b"\1" * 7), FORM, chunk(b"id3 ", b"\2" * 99_999), chunk(b"data", SOUND + b"\7"))
    assert parse_wav(content, "x")[0][:, 0].tolist() == [1, 2, 3, 4]


class Endless(io.RawIOBase):
    """A stream of a header and endless zeros that counts the bytes read."""

    def __init__(self, begin: bytes) -> None:
        self.begin, self.count, self.largest = begin, 0, 0

    def read(self, size: int = -1) -> bytes:
        self.count, self.largest = self.count + size, max(self.largest, size)
        content, self.begin = self.begin[:size], self.begin[size:]
        return content + bytes(size - len(content))


@pytest.mark.parametrize(
    "begin",
    [
        riff(chunk(b"fmt ", form(), 0xFFFFFFFF)),
        riff(FORM, chunk(b"LIST", b"", 0xFFFFFFFE)),
        riff(FORM, chunk(b"\x1b[2J", b"", 0xFFFFFFFF)),
        riff(FORM, chunk(b"LIST", b"", 2**20)),
        riff(FORM),
    ],
)
def test_a_header_is_read_in_bounded_memory_and_time(begin: bytes):
    stream = Endless(begin)
    with pytest.raises(ValueError, match=r"^x is damaged: [ -~]*$"):
        read_header(stream, "x")
    assert stream.count < 2**25
    assert stream.largest <= 2**16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a/b.wav is empty$"),
        (b"RIFF", "a/b.wav.* truncated.* header"),
        (b"fLaC" + bytes(99), "a/b.wav.* not a WAV"),
        (riff(FORM)[:8] + b"AVI " + FORM, "a/b.wav.* not a WAV"),
        (riff(FORM, kind=b"RIFX"), "big-endian"),
        (wav(b"")[:-8], "a/b.wav.* truncated"),
        (wav(bytes(100))[:-30], "a/b.wav.* truncated.* 70.* 100"),
        (wav(b""), "a/b.wav.* empty.* no sound"),
        (wav(b"\0"), "a/b.wav.* empty.* no sound"),
        (riff(chunk(b"data", SOUND), FORM), "a/b.wav.* damaged.* before its format"),
        (riff(chunk(b"fmt ", form()[:14]), chunk(b"data", SOUND)), "format.* 14 bytes"),
        (riff(chunk(b"fmt ", form(code=0xFFFE)[:26]), chunk(b"data", SOUND)), "format.* 26 bytes"),
        (wav(bytes(8), code=2), r"a/b.wav.* 2 \(ADPCM\).* 16 bits"),
        (wav(bytes(8), code=6, bits=8), r" 6 \(A-law\).* 8 bits"),
        (wav(bytes(8), code=7, bits=8), r" 7 \(mu-law\).* 8 bits"),
        (wav(bytes(8), code=3, bits=16), "format 3 .*16 bits"),
        (wav(bytes(8), code=0xFFFE).replace(GUID, bytes(14)), "format 65534 .*16 bits"),
        (wav(bytes(8), bits=12, frame=2), "format 1 .*12 bits"),
        (wav(bytes(8), bits=24, frame=4), "1 channels.* 24 bits.* 3 .*4"),
        (wav(bytes(8), channels=0), "a/b.wav.* 0 channels.* 1 to 64"),
        (wav(bytes(8), channels=65_535, frame=0), "65,535 channels.* 1 to 64"),
        (wav(bytes(8), rate=0), " 0 Hz.* 1,000 to 768,000"),
        (wav(bytes(8), rate=1), " 1 Hz.* 1,000 to 768,000"),
        (wav(bytes(8), rate=400_000_000), "400,000,000 Hz.* 1,000 to 768,000"),
        (wav(np.array([1, np.nan], "<f4").tobytes(), **FLOATS), "a/b.wav.* NaN or infinite"),
        (wav(np.array([1, -np.inf], "<f4").tobytes(), **FLOATS), "NaN or infinite"),
        (wav(np.array([0, -9000], "<f4").tobytes(), **FLOATS), "floating-point.* 9000"),
        (wav(np.array([0, 5], "<f8").tobytes(), bits=64, code=3), "floating-point.* 5"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(content: bytes, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        parse_wav(content, "a/b.wav")
    assert "\n" not in str(caught.value)


def test_floats_somewhat_beyond_full_scale_are_clipped():
    samples, _ = parse_wav(wav(np.array([1.3, -4, 0.25], "<f4").tobytes(), **FLOATS), "x")
    assert samples[:, 0].tolist() == [32767, -32768, 8192]


def test_the_highest_rate_and_most_channels_are_mixed_and_resampled():
    content = np.full(768 * 64, 1000, "<i2").tobytes()
    assert mono(*parse_wav(wav(content, channels=64, rate=768_000), "x")).shape == (16,)


def test_any_damage_is_a_value_error():
    random, whole = np.random.default_rng(0), wav(SOUND, code=0xFFFE)
    for _ in range(3000):
        damaged = bytearray(whole[: random.integers(len(whole) + 1)])
        for place in random.integers(len(damaged) or 1, size=random.integers(4)):
            damaged[place : place + 1] = bytes(random.integers(256, size=1, dtype=np.uint8))
        try:
            parse_wav(bytes(damaged), "x")
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 (the damaged file may still be valid)
