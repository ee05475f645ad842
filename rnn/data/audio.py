"""Sound: WAV files, another sample rate, and the log-mel features of a second of speech.

Samples are 16-bit whole numbers throughout, so that no feature can be NaN or infinite.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RATE = 16_000  # Hz; every clip is a second
WINDOW, HOP = 400, 160  # samples: 25 ms, 10 ms; the spectrum of a window has a step of 40 Hz
BANDS, LOWEST, HIGHEST = 32, 20.0, 8000.0  # mel bands and their range in Hz
MARGIN = 40  # zeros at both ends: frame t is centred at (t + 1) * 10 ms, which makes 99 of them
FRAMES = 99
FLOOR = 1e-6  # added to the energy before the logarithm

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # the formats of a WAV file


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a WAV file: its samples, int16 [frames, channels], and its rate in Hz. See `parse_wav`."""
    return parse_wav(Path(path).read_bytes(), str(path))


def parse_wav(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """The samples, int16 [frames, channels], and the rate in Hz of the bytes of a WAV file.

    Takes PCM of 8, 16, 24 or 32 bits and floating point of 32 or 64; the deeper ones are rounded to 16 bits. Raises
    ValueError, naming `name`, for a file that is empty, truncated, of another format, or whose numbers are not finite.
    """
    if not content:
        raise ValueError(f"{name} is empty")
    if len(content) < 12:
        raise ValueError(f"{name} is truncated: it ends within its header")
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{name} is no WAV file")
    form, position = None, 12
    while position + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if kind == b"data" and form is not None:
            there = len(content) - position
            if size > there:
                raise ValueError(f"{name} is truncated: its header promises {size} bytes of sound, {there} are there")
            return _samples(content[position : position + size], form, name)
        if kind == b"fmt " and size >= 16 and position + size <= len(content):
            form = content[position : position + size]
        position += size + size % 2
    raise ValueError(f"{name} is truncated: it ends before its sound begins")


def _samples(content: bytes, form: bytes, name: str) -> tuple[np.ndarray, int]:
    """The content of a data chunk, read as the format chunk `form` says."""
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", form)
    if code == EXTENSIBLE and len(form) >= 26:
        code = struct.unpack_from("<H", form, 24)[0]
    if (code, bits) not in {(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)}:
        raise ValueError(f"{name}: WAV format {code} of {bits} bits; only PCM and floating point can be read")
    if channels == 0 or rate == 0:
        raise ValueError(f"{name}: a WAV file of {channels} channels at {rate} Hz")
    frame = channels * bits // 8
    if len(content) < frame:
        raise ValueError(f"{name} is empty: it has a header and no sound")
    content = content[: len(content) // frame * frame]
    if code == FLOAT:
        numbers = np.frombuffer(content, f"<f{bits // 8}")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} holds samples that are NaN or infinite")
        samples = to_int16(numbers)
    elif bits == 8:
        samples = (np.frombuffer(content, np.uint8).astype(np.int16) - 128) * 256
    elif bits == 24:  # the two upper bytes of each three
        samples = np.frombuffer(content, np.uint8).reshape(-1, 3)[:, 1:].copy().view("<i2")[:, 0]
    else:
        samples = np.frombuffer(content, f"<i{bits // 8}")
        samples = (samples >> 16 if bits == 32 else samples).astype(np.int16)
    return samples.reshape(-1, channels), rate


def write_wav(path: str | Path, samples: np.ndarray, rate: int = RATE) -> None:
    """Write int16 [frames] as a WAV file of one channel."""
    content = samples.astype("<i2").tobytes()
    header = struct.pack("<HHIIHH", PCM, 1, rate, 2 * rate, 2, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(content))
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + len(content)) + chunks + content)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Numbers of which +-1 is the loudest, rounded to int16; what is louder is clipped."""
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)


def resample(samples: np.ndarray, source: int, target: int = RATE) -> np.ndarray:
    """Floating-point [frames] at `source` Hz as [round(frames * target / source)] at `target` Hz.

    By the Fourier transform of the whole recording: what lies under both Nyquist frequencies stays as it is, the rest
    is cut off. Zeros behind the end keep the end from running into the beginning.
    """
    if source == target:
        return samples
    step = source // math.gcd(source, target)  # so many samples are a whole number of the others
    padded = -(-(len(samples) + source // 10) // step) * step
    count = padded * target // source
    spectrum = np.fft.rfft(samples, padded)
    kept = (min(padded, count) + 1) // 2  # a Nyquist frequency itself stands for two, and is left out
    out = np.fft.irfft(spectrum[:kept], count) * (count / padded)
    return out[: round(len(samples) * target / source)]


def mono(samples: np.ndarray, rate: int) -> np.ndarray:
    """int16 [frames, channels] at `rate` Hz as int16 [frames] at 16 kHz, the channels' mean."""
    if samples.shape[1] == 1 and rate == RATE:
        return samples[:, 0]
    return to_int16(resample(samples.mean(1) / 32768.0, rate))


def mel_filters() -> Tensor:
    """float32 [201, 32]: the weight of each frequency in each band.

    Triangles whose corners are evenly spaced on the mel scale 2595 log10(1 + f / 700) (O'Shaughnessy, 1987); a band
    begins at the centre of the one below it and ends at the centre of the one above.
    """
    mel_range = 2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)
    corners = 700 * (10 ** (np.linspace(*mel_range, BANDS + 2) / 2595) - 1)
    frequencies = np.arange(WINDOW // 2 + 1)[:, None] * (RATE / WINDOW)
    rising = (frequencies - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies) / (corners[2:] - corners[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling))).float()


class LogMel:
    """The front end: int16 or floating-point [B, 16000] on `device` -> float32 [B, 99, 32].

    log(energy + 1e-6) in 32 mel bands of 25 ms Hann windows every 10 ms, of samples between -1 and 1 (floating-point
    input is taken to be that already). Frame t is centred at (t + 1) * 10 ms; 2.5 ms of zeros stand at both ends.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.window = torch.hann_window(WINDOW, device=device)
        self.filters = mel_filters().to(device)

    def __call__(self, waveforms: Tensor) -> Tensor:
        if waveforms.device.type == "cpu":  # a few clips at a time stay in the processor's cache: nearly twice as fast
            return torch.cat([self._features(part) for part in waveforms.split(8)])
        return self._features(waveforms)

    def _features(self, waveforms: Tensor) -> Tensor:
        if not waveforms.is_floating_point():
            waveforms = waveforms.float() / 32768
        return self.of_windows(F.pad(waveforms, (MARGIN, MARGIN)).unfold(1, WINDOW, HOP))

    def of_windows(self, windows: Tensor) -> Tensor:
        """The features of windows of samples between -1 and 1, float32 [..., 400] -> [..., 32]."""
        spectrum = torch.fft.rfft(windows * self.window)
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.filters + FLOOR).log_()
