"""Sound: resampling, and the log-mel features of one second of speech.

Samples are 16-bit integers throughout, so no feature can be NaN or infinite.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from str_triton.rnn.data.wav import parse_wav, read_wav, to_int16, write_wav

__all__ = ["LogMel", "mel_filters", "mono", "parse_wav", "read_wav", "resample", "to_int16", "write_wav"]

RATE = 16_000  # Hz; every clip is one second long
WINDOW, HOP = 400, 160  # samples: 25 ms, 10 ms; the spectrum of a window has a step of 40 Hz
BANDS, LOWEST, HIGHEST = 32, 20.0, 8000.0  # mel bands and their range in Hz
MARGIN = 40  # zeros at both ends: frame t is centred at (t + 1) * 10 ms, so a clip has 99 frames
FRAMES = 99
FLOOR = 1e-6  # added to the energy before the logarithm


def resample(samples: np.ndarray, source: int, target: int = RATE) -> np.ndarray:
    """Resample floating-point [frames] from `source` Hz to `target` Hz: [round(frames * target / source)].

    The Fourier transform of the whole recording is cut at the lower of the two Nyquist frequencies. Zeros after the end
    keep the end from wrapping around to the beginning.
    """
    if source == target:
        return samples
    step = source // math.gcd(source, target)  # `step` source samples are a whole number of target samples
    padded = -(-(len(samples) + source // 10) // step) * step
    count = padded * target // source
    spectrum = np.fft.rfft(samples, padded)
    kept = (min(padded, count) + 1) // 2  # without the Nyquist frequency, where two frequencies coincide
    out = np.fft.irfft(spectrum[:kept], count) * (count / padded)
    return out[: round(len(samples) * target / source)]


def mono(samples: np.ndarray, rate: int) -> np.ndarray:
    """Average the channels of int16 [frames, channels] at `rate` Hz and resample to int16 [frames] at 16 kHz."""
    if samples.shape[1] == 1 and rate == RATE:
        return samples[:, 0]
    return to_int16(resample(samples.mean(1) / 32768.0, rate))


def mel_filters() -> Tensor:
    """Return the weight of each frequency in each mel band, float32 [201, 32].

    Each band is a triangle. The corners are evenly spaced on the mel scale 2595 log10(1 + f / 700) (O'Shaughnessy,
    1987). A band begins at the centre of the band below and ends at the centre of the band above.
    """
    low, high = 2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)
    corners = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)
    frequencies = np.arange(WINDOW // 2 + 1)[:, None] * (RATE / WINDOW)
    rising = (frequencies - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies) / (corners[2:] - corners[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling))).float()


class LogMel:
    """The front end: int16 or floating-point [B, 16000] on `device` -> float32 [B, 99, 32].

    A feature is log(energy + 1e-6) in one of 32 mel bands of a 25 ms Hann window; windows begin every 10 ms. int16
    samples are scaled to -1 ... 1; floating-point samples must have that range already. Frame t is centred at
    (t + 1) * 10 ms, because 2.5 ms of zeros are added at both ends.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.window = torch.hann_window(WINDOW, device=device)
        self.filters = mel_filters().to(device)

    def __call__(self, waveforms: Tensor) -> Tensor:
        if waveforms.device.type == "cpu":  # eight clips fit into the processor's cache: nearly twice as fast
            return torch.cat([self._features(part) for part in waveforms.split(8)])
        return self._features(waveforms)

    def _features(self, waveforms: Tensor) -> Tensor:
        if not waveforms.is_floating_point():
            waveforms = waveforms.float() / 32768
        return self.from_windows(F.pad(waveforms, (MARGIN, MARGIN)).unfold(1, WINDOW, HOP))

    def from_windows(self, windows: Tensor) -> Tensor:
        """Return the features, float32 [..., 32], of windows of samples between -1 and 1, float32 [..., 400]."""
        spectrum = torch.fft.rfft(windows * self.window)
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.filters + FLOOR).log_()
