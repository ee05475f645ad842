"""Streams of sound: 16-bit samples in chunks, and their log-mel features."""

from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from str_triton.rnn.data.audio import BANDS, HOP, MARGIN, RATE, WINDOW, LogMel
from str_triton.rnn.data.wav import PCM, is_wav, read_header
from str_triton.training.errors import warn

CHUNK = RATE // 10  # samples that are read at once
CONVERT = f"ffmpeg -i IN -ar {RATE} -ac 1 -c:a pcm_s16le OUT.wav"


class LogMelStream:
    """Log-mel features of a stream of samples.

    Call it with the next samples, int16 [any], to get the frames that are now complete, float32 [frames, 32]. The
    frames of all calls together equal `LogMel`'s frames of the whole recording, except for the last frame, which
    `LogMel` completes with zeros.
    """

    def __init__(self) -> None:
        self._log_mel = LogMel()
        self._kept = torch.zeros(MARGIN)

    def __call__(self, samples: Tensor) -> Tensor:
        sound = torch.cat([self._kept, samples.float() / 32768])
        count = max(0, (len(sound) - WINDOW) // HOP + 1)
        self._kept = sound[count * HOP :]
        if count == 0:
            return torch.empty(0, BANDS)
        return self._log_mel.from_windows(sound[: (count - 1) * HOP + WINDOW].unfold(0, WINDOW, HOP))


def pieces(stream: BinaryIO, name: str, rate: int | None) -> Iterator[Tensor]:
    """Yield the samples of a stream in chunks, int16 [up to 1600], in constant memory.

    The stream holds a WAV file or, with ``rate``, raw little-endian samples. Raises ValueError, naming ``name``, for
    an empty stream, a stream that is not a WAV file, and sound that is not 16-bit mono at 16 kHz.
    """
    if rate is None:
        left = _wav_header(stream, name)
    else:
        _check_rate(name, rate)
        left = None
    empty = True
    while left is None or left > 0:
        wanted = 2 * CHUNK if left is None else min(2 * CHUNK, left)
        content = stream.read(wanted)
        if rate is not None and empty and is_wav(content):
            raise ValueError(f"{name} is a WAV file, which states its own rate: leave out --rate {rate}")
        left = None if left is None else left - len(content)
        if len(content) < wanted and left:
            warn(f"{name} is truncated: {left} bytes of sound are missing")
            left = 0
        if len(content) >= 2:
            empty = False
            yield torch.frombuffer(bytearray(content[: len(content) // 2 * 2]), dtype=torch.int16)
        if len(content) < wanted:
            break
    if empty:
        raise ValueError(f"{name} is empty: it holds no sound")


def _wav_header(stream: BinaryIO, name: str) -> int | None:
    """Read and check the header; return the number of bytes of samples, or None where they last until the end."""
    first = stream.read(4)
    if not first:
        raise ValueError(f"{name} is empty")
    if not is_wav(first):
        raise ValueError(f"{name} is not a WAV file; for raw 16-bit samples give their rate, --rate {RATE}")
    header = read_header(stream, name, first)
    if (header.code, header.bits) != (PCM, 16):
        raise ValueError(f"{name}: WAV format {header.code} of {header.bits} bits; only 16-bit PCM is read: {CONVERT}")
    if header.channels != 1:
        raise ValueError(f"{name} has {header.channels} channels; only one is read: mix them, {CONVERT}")
    _check_rate(name, header.rate)
    return header.size


def _check_rate(name: str, rate: int) -> None:
    if rate != RATE:
        raise ValueError(f"{name} is at {rate} Hz; the networks were trained at {RATE} Hz: resample it, {CONVERT}")
