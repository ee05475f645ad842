"""Sound that comes piece by piece: 16-bit samples from a stream, and their log-mel features."""

from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from rnn.data.audio import BANDS, HOP, MARGIN, RATE, WINDOW, LogMel
from rnn.data.wav import PCM, is_wav, read_header
from str_triton.training.errors import warn

PIECE = RATE // 10  # samples that are read at once
CONVERT = f"ffmpeg -i IN -ar {RATE} -ac 1 -c:a pcm_s16le OUT.wav"


class LogMelStream:
    """The features of `LogMel` of a recording of any length, as its samples come.

    Called with int16 [any] it gives the frames that are whole now, float32 [frames, 32]. Those of all calls together
    are `LogMel`'s of the recording, without the last frame, for which it puts zeros behind the end.
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
        return self._log_mel.of_windows(sound[: (count - 1) * HOP + WINDOW].unfold(0, WINDOW, HOP))


def pieces(stream: BinaryIO, name: str, rate: int | None) -> Iterator[Tensor]:
    """Yield the samples of a stream, int16 [up to 1600] at a time, in constant memory.

    The stream holds a WAV file or, with ``rate``, bare little-endian samples. Raises ValueError, naming ``name``, for
    an empty stream, a stream that is no WAV file, and sound that is not of 16 bits, one channel and 16 kHz.
    """
    if rate is None:
        left = _wav_header(stream, name)
    else:
        _check_rate(name, rate)
        left = None
    empty = True
    while left is None or left > 0:
        wanted = 2 * PIECE if left is None else min(2 * PIECE, left)
        content = stream.read(wanted)
        if rate is not None and empty and is_wav(content):
            raise ValueError(f"{name} begins as a WAV file does: leave out --rate {rate}")
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
        raise ValueError(f"{name} is empty: there is no sound in it")


def _wav_header(stream: BinaryIO, name: str) -> int | None:
    """Read up to the samples; return how many bytes of them the header promises, None: until the end."""
    first = stream.read(4)
    if not first:
        raise ValueError(f"{name} is empty")
    if not is_wav(first):
        raise ValueError(f"{name} is no WAV file; for bare 16-bit samples give their rate, --rate {RATE}")
    header = read_header(stream, name, first)
    if (header.code, header.bits) != (PCM, 16):
        raise ValueError(f"{name}: WAV format {header.code} of {header.bits} bits; it takes PCM of 16 bits: {CONVERT}")
    if header.channels != 1:
        raise ValueError(f"{name} has {header.channels} channels; it takes one: mix them, {CONVERT}")
    _check_rate(name, header.rate)
    return header.size


def _check_rate(name: str, rate: int) -> None:
    if rate != RATE:
        raise ValueError(f"{name} is at {rate} Hz; the networks were trained at {RATE} Hz: resample it, {CONVERT}")
