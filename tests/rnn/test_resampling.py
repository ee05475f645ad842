"""The resampler of streams: against its formula, against exact tones, and without aliases."""

import math

import pytest
import torch
from torch import Tensor

from str_triton.rnn.data import resampling
from str_triton.rnn.data.audio import resample
from str_triton.rnn.data.resampling import StreamResampler

RATES = (8_000, 11_025, 15_999, 22_050, 44_100, 48_000, 96_000)


def resampled(x: Tensor, source: int, target: int = 16_000, pieces: list[int] | None = None) -> Tensor:
    stream = StreamResampler(source, target)
    parts = [stream(part) for part in (x.split(pieces) if pieces else [x])]
    return torch.cat([*parts, stream.end()])


def tone(frequency: float, rate: int, seconds: float = 0.25) -> Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds), dtype=torch.float64) / rate)


@pytest.mark.parametrize(("source", "target"), [(3, 2), (2, 3), (5, 1), (441, 160), (7, 7)])
def test_it_is_the_formula(source: int, target: int):
    """Sum every input times the windowed sinc, with the Kaiser window by its series."""
    x = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    c = 0.955 * min(1, target / source)
    width = 64 / c

    def bessel(value: float) -> float:
        return sum((value / 2) ** (2 * k) / math.factorial(k) ** 2 for k in range(25))

    def weight(t: float) -> float:
        if abs(t) >= width:
            return 0.0
        sinc = 1.0 if t == 0 else math.sin(math.pi * c * t) / (math.pi * c * t)
        return c * sinc * bessel(9.0 * math.sqrt(1 - (t / width) ** 2)) / bessel(9.0)

    expected = [
        sum(value * weight(n * source / target - k) for k, value in enumerate(x))
        for n in range(round(len(x) * target / source))
    ]
    own = resampled(torch.tensor(x, dtype=torch.float64), source, target)
    torch.testing.assert_close(own, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_stays_the_tone(rate: int):
    x = tone(3000.0, rate)
    own = resampled(x, rate)
    assert len(own) == round(len(x) * 16_000 / rate)
    middle = slice(200, len(own) - 200)  # the tone begins and ends suddenly
    torch.testing.assert_close(own[middle], tone(3000.0, 16_000)[middle], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", RATES)
def test_it_agrees_with_the_resampling_of_training_data(rate: int):
    """A chirp below 3 kHz that begins and ends softly, against the Fourier transform of the whole recording."""
    time = torch.arange(int(rate * 0.25), dtype=torch.float64) / rate
    chirp = torch.sin(2 * math.pi * 6000 * time.square()) * torch.sin(math.pi * time / 0.25).square()
    own, other = resampled(chirp, rate), torch.from_numpy(resample(chirp.numpy(), rate))
    torch.testing.assert_close(own, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("frequency", [8_000.0, 8_300.0, 10_000.0, 10_900.0])
def test_what_cannot_be_kept_does_not_alias(rate: int, frequency: float):
    own = resampled(tone(frequency, rate), rate)
    assert own[200:-200].abs().max() < 10 ** (-80 / 20)


def test_what_is_added_between_samples_is_no_image():
    """8 kHz to 16 kHz: a tone of 3 kHz has no image at 5 kHz."""
    own = resampled(tone(3000.0, 8_000), 8_000)[200:-200]
    assert (own - tone(3000.0, 16_000)[200:-200]).abs().max() < 10 ** (-80 / 20)


@pytest.mark.parametrize("rate", [8_000, 44_100, 15_999])
def test_pieces_and_stored_weights_change_nothing(rate: int, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(5_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = resampled(x, rate)
    for pieces in ([1] * 300 + [4_700], [1600, 1600, 1600, 200], [7] * 14 + [0, 4_902]):
        torch.testing.assert_close(resampled(x, rate, pieces=pieces), whole, rtol=0, atol=1e-13)
    monkeypatch.setattr(resampling, "MOST_WEIGHTS", 0)
    torch.testing.assert_close(resampled(x, rate), whole, rtol=0, atol=1e-13)


def test_memory_is_constant():
    stream = StreamResampler(44_100, 16_000)
    kept = []
    for _ in range(20):
        stream(torch.zeros(4_410))
        kept.append(len(stream._kept))
    assert max(kept[2:]) <= kept[2] + 3
    assert len(StreamResampler(44_100, 16_000).end()) == 0
