"""Streams of sound: samples at 16 kHz in chunks, and their log-mel features."""

from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from str_triton.rnn.data.audio import BANDS, HOP, MARGIN, RATE, WINDOW, LogMel
from str_triton.rnn.data.resampling import StreamResampler
from str_triton.rnn.data.wav import PCM, RATES, Header, decode_samples, is_wav, read_header, to_int16
from str_triton.training.errors import warn


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
    """Yield the sound of a stream in chunks of up to 0.1 s, int16 [any] at 16 kHz, in constant memory.

    The stream holds a WAV file of any rate, depth and number of channels that `wav` reads, or with ``rate`` raw
    little-endian 16-bit samples of one channel at that rate. Channels are averaged and other rates resampled. Raises
    ValueError, naming ``name``, for an empty stream and for a stream of another kind.
    """
    header = _wav_header(stream, name) if rate is None else _raw_header(name, rate)
    if header.rate < RATE:
        warn(
            f"{name} has {header.rate:,} Hz, the network's features {RATE:,} Hz: the bands above "
            f"{header.rate // 2:,} Hz are empty, so words may be wrong or missing"
        )
    resampler = None if header.rate == RATE else StreamResampler(header.rate, RATE)
    empty = True
    for content in _frames(stream, name, header, check_wav=rate is not None):
        empty = False
        samples = decode_samples(content, header, name)
        if resampler is None and header.channels == 1:
            yield torch.from_numpy(samples[:, 0].copy())
            continue
        mixed = torch.from_numpy(samples.mean(1) / 32768.0)
        yield _to_int16(mixed if resampler is None else resampler(mixed))
    if empty:
        raise ValueError(f"{name} is empty: it holds no sound")
    if resampler is not None:
        yield _to_int16(resampler.end())


def _to_int16(samples: Tensor) -> Tensor:
    return torch.from_numpy(to_int16(samples.numpy()))


def _frames(stream: BinaryIO, name: str, header: Header, *, check_wav: bool) -> Iterator[bytes]:
    """Yield the bytes of whole frames, of 0.1 s and the rest. Warn of a file that ends before its header says."""
    frame = header.channels * header.bits // 8
    chunk, left = max(1, header.rate // 10) * frame, header.size
    while left is None or left > 0:
        wanted = chunk if left is None else min(chunk, left)
        content = stream.read(wanted)
        if check_wav and is_wav(content):
            raise ValueError(f"{name} is a WAV file, which states its own rate: leave out --rate {header.rate}")
        check_wav = False
        left = None if left is None else left - len(content)
        if len(content) < wanted and left:
            warn(f"{name} is truncated: {left} bytes of sound are missing")
        if len(content) >= frame:
            yield content[: len(content) // frame * frame]
        if len(content) < wanted:
            return


def _wav_header(stream: BinaryIO, name: str) -> Header:
    """Read and check the header of a WAV file."""
    first = stream.read(4)
    if not first:
        raise ValueError(f"{name} is empty")
    if not is_wav(first):
        raise ValueError(f"{name} is not a WAV file; for raw 16-bit samples give their rate, such as --rate {RATE}")
    return read_header(stream, name, first)


def _raw_header(name: str, rate: int) -> Header:
    """Return the header of raw samples."""
    least, most = RATES
    if not least <= rate <= most:
        raise ValueError(f"{name}: --rate {rate}: it must be {least:,} to {most:,} Hz")
    return Header(PCM, 1, rate, 16, None)
