"""WAV files: one reader of headers for whole files and for streams, and samples as 16-bit whole numbers."""

import io
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # the formats that can be read; EXTENSIBLE names one of the others
DEPTHS = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
OTHER_FORMATS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x31: "GSM", 0x50: "MPEG", 0x55: "MP3"}
SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")  # ends the GUID of every format that has a number
RATES, CHANNELS = (1_000, 768_000), (1, 64)
UNKNOWN_SIZE = 0x7FFF0000  # sizes from here to 2^32 - 1 come from programs that write to a pipe
LONGEST_HEADER = 2**24  # bytes in front of the samples; pictures of albums have to fit
MOST_CHUNKS, LONGEST_FORMAT = 1_000, 1_024
LOUDEST = 4.0  # floating-point samples: 1 is full scale, mastering goes somewhat beyond it


class Header(NamedTuple):
    """What stands in front of the samples: their format, and how many bytes of them follow (None: until the end)."""

    code: int
    channels: int
    rate: int
    bits: int
    size: int | None


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a WAV file: its samples, int16 [frames, channels], and its rate in Hz. See `parse_wav`."""
    return parse_wav(Path(path).read_bytes(), str(path))


def is_wav(content: bytes) -> bool:
    """Tell whether the first bytes of a file are a WAV file's."""
    return content[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX")


def parse_wav(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Return the samples, int16 [frames, channels], and the rate in Hz of the bytes of a WAV file.

    Takes PCM of 8, 16, 24 or 32 bits and floating point of 32 or 64; the deeper ones are rounded to 16 bits, and
    floating-point samples beyond full scale (-1 to 1) are clipped. A header without a size, as programs write it to a
    pipe, means all that follows.

    Raises ValueError, naming `name`, for a file that is empty, truncated, of another format, rate or number of
    channels, and for samples that are not finite or that were never scaled to -1 ... 1.
    """
    if not content:
        raise ValueError(f"{name} is empty")
    stream = io.BytesIO(content)
    header = read_header(stream, name)
    sound = content[stream.tell() :]
    if header.size is not None and header.size > len(sound):
        raise ValueError(
            f"{name} is truncated: its header promises {header.size} bytes of sound, {len(sound)} are there"
        )
    return _samples(sound[: header.size], header, name), header.rate


def read_header(stream: BinaryIO, name: str, begin: bytes = b"") -> Header:
    """Read a WAV file's header, so that the samples are what `stream` gives next.

    `begin` is what was read of it before. Raises ValueError, naming `name`. A header may take 16 MiB in front of the
    samples, of which few are in memory at a time.
    """
    begin += stream.read(12 - len(begin))
    if len(begin) < 12 and is_wav(begin):
        raise ValueError(f"{name} is truncated: it ends within its header")
    if not is_wav(begin) or begin[8:] != b"WAVE":
        raise ValueError(f"{name} is no WAV file")
    if begin[:4] == b"RIFX":
        raise ValueError(f"{name} is a big-endian WAV file (RIFX); only little-endian ones (RIFF) can be read")
    position, whole, form, long_size = 12, struct.unpack_from("<I", begin, 4)[0], None, None
    for _ in range(MOST_CHUNKS):
        if len(chunk := stream.read(8)) < 8:
            raise ValueError(f"{name} is truncated: it ends before its sound begins")
        kind, size = struct.unpack("<4sI", chunk)
        position += 8
        if kind == b"data":
            if form is None:
                raise ValueError(f"{name} is damaged: its sound comes in front of its format")
            return Header(*form, _sound_size(size, whole, position, long_size))
        padded = size + size % 2
        if position + padded > LONGEST_HEADER or (kind == b"fmt " and size > LONGEST_FORMAT):
            raise ValueError(
                f"{name} is damaged: a chunk {str(kind)[1:]} of {size:,} bytes stands in front of its sound"
            )
        position += padded
        content = stream.read(min(padded, LONGEST_FORMAT))
        if kind == b"fmt " and len(content) == padded:
            form = _form(content[:size], name)
        elif kind == b"ds64" and len(content) >= 16:  # sizes beyond 4 GiB: of the whole file, then of its sound
            long_size = struct.unpack_from("<Q", content, 8)[0]
        _skip(stream, padded - len(content))
    raise ValueError(f"{name} is damaged: {MOST_CHUNKS:,} chunks come before its sound")


def _sound_size(size: int, whole: int, position: int, long_size: int | None) -> int | None:
    """Return the bytes of sound that a header promises, None where it does not know.

    size and whole are what its data chunk and its beginning say; the sound begins at `position`.
    """
    if size == 0xFFFFFFFF and long_size is not None:
        return long_size if 0 < long_size < 2**62 else None
    if size >= UNKNOWN_SIZE:
        return None
    # A recorder that was stopped leaves zeros; only a file that says that other chunks follow is really empty.
    return size if size > 0 or position < whole + 8 < UNKNOWN_SIZE else None


def _form(content: bytes, name: str) -> tuple[int, int, int, int]:
    """Return code, channels, rate and bits of a format chunk, all of them checked."""
    if len(content) < 16:
        raise ValueError(f"{name} is damaged: its format takes {len(content)} bytes, not 16 or more")
    code, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", content)
    if code == EXTENSIBLE:
        if len(content) < 40:
            raise ValueError(f"{name} is damaged: its format takes {len(content)} bytes, not 40 or more")
        code = struct.unpack_from("<H", content, 24)[0] if content[26:40] == SUBFORMAT else EXTENSIBLE
    if bits not in DEPTHS.get(code, ()):
        kind = f"{code} ({OTHER_FORMATS[code]})" if code in OTHER_FORMATS else code
        raise ValueError(
            f"{name}: WAV format {kind} of {bits} bits; PCM of 8, 16, 24 or 32 bits and floating point of 32 or 64 "
            "can be read: convert it, ffmpeg -i IN -c:a pcm_s16le OUT.wav"
        )
    for value, (least, most), unit in ((channels, CHANNELS, "channels"), (rate, RATES, "Hz")):
        if not least <= value <= most:
            raise ValueError(f"{name}: a WAV file of {value:,} {unit}; {least:,} to {most:,} can be read")
    if frame not in (0, channels * bits // 8):
        raise ValueError(
            f"{name} is damaged: {channels} channels of {bits} bits take {channels * bits // 8} bytes, "
            f"not {frame} as its header says"
        )
    return code, channels, rate, bits


def _samples(content: bytes, header: Header, name: str) -> np.ndarray:
    """Return the samples in `content` as int16 [frames, channels]; a last frame that is cut short is left out."""
    frame = header.channels * header.bits // 8
    if len(content) < frame:
        raise ValueError(f"{name} is empty: it has a header and no sound")
    content = content[: len(content) // frame * frame]
    if header.code == FLOAT:
        samples = to_int16(_checked(np.frombuffer(content, f"<f{header.bits // 8}"), name))
    elif header.bits == 8:
        samples = (np.frombuffer(content, np.uint8).astype(np.int16) - 128) * 256
    elif header.bits == 24:  # the two upper bytes of each three
        samples = np.frombuffer(content, np.uint8).reshape(-1, 3)[:, 1:].copy().view("<i2")[:, 0]
    else:
        samples = np.frombuffer(content, f"<i{header.bits // 8}")
        samples = (samples >> 16 if header.bits == 32 else samples).astype(np.int16)
    return samples.reshape(-1, header.channels)


def _checked(samples: np.ndarray, name: str) -> np.ndarray:
    """Return floating-point samples; raise ValueError where they are not finite, or not scaled to -1 ... 1."""
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} holds samples that are NaN or infinite")
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise ValueError(
            f"{name} holds floating-point samples up to {peak:g}, and full scale is 1: divide them by the largest "
            "value of their kind (32768 where they were 16-bit numbers), or save them as 16-bit numbers"
        )
    return samples


def _skip(stream: BinaryIO, size: int) -> None:
    """Read `size` bytes, a little at a time, and forget them."""
    while size > 0 and (content := stream.read(min(size, 2**16))):
        size -= len(content)


def write_wav(path: str | Path, samples: np.ndarray, rate: int = 16_000) -> None:
    """Write int16 [frames] as a WAV file of one channel."""
    content = samples.astype("<i2").tobytes()
    header = struct.pack("<HHIIHH", PCM, 1, rate, 2 * rate, 2, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(content))
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + len(content)) + chunks + content)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Return floating-point samples, of which 1 is full scale, rounded to int16; what is louder is clipped."""
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)
