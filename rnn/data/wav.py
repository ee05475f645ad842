"""WAV files: a header reader for files and streams, and samples as 16-bit integers."""

import io
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # the formats that can be read; EXTENSIBLE stands for one of the other two
DEPTHS = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
OTHER_FORMATS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "ADPCM", 0x31: "GSM", 0x50: "MPEG", 0x55: "MP3"}
SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")  # the end of the GUID of every format that has a number
RATES, CHANNELS = (1_000, 768_000), (1, 64)
UNKNOWN_SIZE = 0x7FFF0000  # programs that write to a pipe state a size between this and 2^32 - 1
LONGEST_HEADER = 2**24  # the maximum bytes before the samples; album pictures must fit
MOST_CHUNKS, LONGEST_FORMAT = 1_000, 1_024
LOUDEST = 4.0  # the maximum of floating-point samples; full scale is 1, and some recordings exceed it a little


class Header(NamedTuple):
    """The header of a WAV file: the samples' format, and `size`, their number of bytes (None: until the end)."""

    code: int
    channels: int
    rate: int
    bits: int
    size: int | None


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a WAV file; return its samples, int16 [frames, channels], and its rate in Hz. See `parse_wav`."""
    return parse_wav(Path(path).read_bytes(), str(path))


def is_wav(content: bytes) -> bool:
    """Return whether a file that begins with `content` is a WAV file."""
    return content[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX")


def parse_wav(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Parse the bytes of a WAV file; return its samples, int16 [frames, channels], and its rate in Hz.

    Accepts PCM of 8, 16, 24 or 32 bits and floating point of 32 or 64 bits. All samples are converted to 16 bits;
    floating-point samples beyond full scale (-1 to 1) are clipped. Where the header has no size, as programs write it
    to a pipe, the samples last until the end.

    Raises ValueError, naming `name`, for a file that is empty, truncated, or of another format, rate or number of
    channels, and for samples that are not finite or not scaled to -1 ... 1.
    """
    if not content:
        raise ValueError(f"{name} is empty")
    stream = io.BytesIO(content)
    header = read_header(stream, name)
    sound = content[stream.tell() :]
    if header.size is not None and header.size > len(sound):
        raise ValueError(f"{name} is truncated: it holds {len(sound)} bytes of sound, and {header.size} by its header")
    return decode_samples(sound[: header.size], header, name), header.rate


def read_header(stream: BinaryIO, name: str, begin: bytes = b"") -> Header:
    """Read a WAV file's header; after it `stream` stands at the samples.

    begin: the bytes that were already read from the stream. Raises ValueError, naming `name`. The header may take up to
    16 MiB. It is read in constant memory.
    """
    begin += stream.read(12 - len(begin))
    if len(begin) < 12 and is_wav(begin):
        raise ValueError(f"{name} is truncated: it ends within its header")
    if not is_wav(begin) or begin[8:] != b"WAVE":
        raise ValueError(f"{name} is not a WAV file")
    if begin[:4] == b"RIFX":
        raise ValueError(f"{name} is a big-endian WAV file (RIFX); only little-endian ones (RIFF) can be read")
    position, riff_size, sample_format, long_size = 12, struct.unpack_from("<I", begin, 4)[0], None, None
    for _ in range(MOST_CHUNKS):
        if len(chunk := stream.read(8)) < 8:
            raise ValueError(f"{name} is truncated: it ends before its sound begins")
        kind, size = struct.unpack("<4sI", chunk)
        position += 8
        if kind == b"data":
            if sample_format is None:
                raise ValueError(f"{name} is damaged: its sound comes before its format")
            return Header(*sample_format, _sound_size(size, riff_size, position, long_size))
        padded = size + size % 2
        if position + padded > LONGEST_HEADER or (kind == b"fmt " and size > LONGEST_FORMAT):
            raise ValueError(f"{name} is damaged: a chunk {str(kind)[1:]} of {size:,} bytes comes before its sound")
        position += padded
        content = stream.read(min(padded, LONGEST_FORMAT))
        if kind == b"fmt " and len(content) == padded:
            sample_format = _parse_format(content[:size], name)
        elif kind == b"ds64" and len(content) >= 16:  # 64-bit sizes of the file and of its sound
            long_size = struct.unpack_from("<Q", content, 8)[0]
        _skip(stream, padded - len(content))
    raise ValueError(f"{name} is damaged: {MOST_CHUNKS:,} chunks come before its sound")


def _sound_size(size: int, riff_size: int, position: int, long_size: int | None) -> int | None:
    """Return the number of bytes of sound by the header, or None where the header does not state it.

    size, riff_size, long_size: the sizes that the chunks data, RIFF and ds64 state. The sound begins at `position`.
    """
    if size == 0xFFFFFFFF and long_size is not None:
        return long_size if 0 < long_size < 2**62 else None
    if size >= UNKNOWN_SIZE:
        return None
    # A recorder that was killed leaves size 0. The file is really empty only if more chunks follow by the RIFF size.
    return size if size > 0 or position < riff_size + 8 < UNKNOWN_SIZE else None


def _parse_format(content: bytes, name: str) -> tuple[int, int, int, int]:
    """Return code, channels, rate and bits of a format chunk; raise ValueError for values that cannot be read."""
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


def decode_samples(content: bytes, header: Header, name: str) -> np.ndarray:
    """Decode samples to int16 [frames, channels]; an incomplete last frame is dropped."""
    frame = header.channels * header.bits // 8
    if len(content) < frame:
        raise ValueError(f"{name} is empty: it has a header but no sound")
    content = content[: len(content) // frame * frame]
    if header.code == FLOAT:
        samples = to_int16(_check_range(np.frombuffer(content, f"<f{header.bits // 8}"), name))
    elif header.bits == 8:
        samples = (np.frombuffer(content, np.uint8).astype(np.int16) - 128) * 256
    elif header.bits == 24:  # keep the upper two of three bytes
        samples = np.frombuffer(content, np.uint8).reshape(-1, 3)[:, 1:].copy().view("<i2")[:, 0]
    else:
        samples = np.frombuffer(content, f"<i{header.bits // 8}")
        samples = (samples >> 16 if header.bits == 32 else samples).astype(np.int16)
    return samples.reshape(-1, header.channels)


def _check_range(samples: np.ndarray, name: str) -> np.ndarray:
    """Return floating-point samples; raise ValueError where they are not finite or not scaled to -1 ... 1."""
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} holds samples that are NaN or infinite")
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise ValueError(
            f"{name} holds floating-point samples up to {peak:g}, but full scale is 1: divide them by their full scale "
            "(32768 for 16-bit samples), or save them as 16-bit integers"
        )
    return samples


def _skip(stream: BinaryIO, size: int) -> None:
    """Read and discard `size` bytes in constant memory."""
    while size > 0 and (content := stream.read(min(size, 2**16))):
        size -= len(content)


def write_wav(path: str | Path, samples: np.ndarray, rate: int = 16_000) -> None:
    """Write int16 [frames] as a mono WAV file."""
    content = samples.astype("<i2").tobytes()
    header = struct.pack("<HHIIHH", PCM, 1, rate, 2 * rate, 2, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(content))
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + len(content)) + chunks + content)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Round floating-point samples with full scale 1 to int16; clip louder samples."""
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)
