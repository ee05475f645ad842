"""Resampling, and the log-mel features compared with a literal sum in float64."""

import math

import numpy as np
import pytest
import torch

from str_triton.rnn.data.audio import BANDS, FRAMES, RATE, LogMel, mel_filters, resample


def tone(frequency: float, seconds: float = 1.0, rate: int = RATE, volume: float = 0.5) -> np.ndarray:
    return volume * np.sin(2 * math.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_tone_and_its_length(rate: int):
    got, expected = resample(tone(1000, 0.72, rate), rate), tone(1000, 0.72)
    assert len(got) == len(expected)
    inner = slice(800, -800)  # without the ends, where the tone begins and stops abruptly
    assert np.abs(got[inner] - expected[inner]).max() < 2e-3


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    got = resample(tone(9000, 1.0, 44100), 44100)
    assert np.abs(got[800:-800]).max() < 2e-3


def test_the_end_does_not_run_into_the_beginning():
    click = np.zeros(22050)
    click[-1] = 1
    assert np.abs(resample(click, 22050)[:8000]).max() < 1e-3


def literal_log_mel(samples: np.ndarray) -> np.ndarray:
    """Compute the features of samples between -1 and 1 in float64, one frame, frequency and band at a time."""
    padded = np.concatenate([np.zeros(40), samples, np.zeros(40)])
    window = np.array([0.5 - 0.5 * math.cos(2 * math.pi * n / 400) for n in range(400)])
    mel = [2595 * math.log10(1 + f / 700) for f in (20, 8000)]
    corners = [700 * (10 ** ((mel[0] + k * (mel[1] - mel[0]) / 33) / 2595) - 1) for k in range(34)]
    rows = []
    for start in range(0, len(padded) - 399, 160):
        frame = padded[start : start + 400] * window
        bands = np.full(32, 1e-6)
        for k in range(201):
            turn = np.exp(-2j * math.pi * k * np.arange(400) / 400)
            power = abs((frame * turn).sum()) ** 2
            frequency = k * 40
            for band in range(32):
                low, centre, high = corners[band : band + 3]
                if low < frequency <= centre:
                    bands[band] += power * (frequency - low) / (centre - low)
                elif centre < frequency < high:
                    bands[band] += power * (high - frequency) / (high - centre)
        rows.append(np.log(bands))
    return np.array(rows)


def test_log_mel_is_the_literal_sum():
    samples = np.round(32768 * (tone(440) + 0.1 * np.random.default_rng(0).standard_normal(RATE))) / 32768
    expected = literal_log_mel(samples[:1600])
    short = torch.from_numpy(samples[:1600])[None]
    assert expected.shape == (9, 32)
    torch.testing.assert_close(LogMel()(short.float())[0].double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    integers = (short * 32768).to(torch.int16)
    torch.testing.assert_close(LogMel()(integers), LogMel()(short.float()))


def test_a_second_has_99_frames_and_the_features_do_not_depend_on_the_batch():
    clips = torch.randint(-9000, 9000, (19, RATE), dtype=torch.int16)
    features = LogMel()(clips)
    assert features.shape == (19, FRAMES, BANDS) == (19, 99, 32)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[17:18], LogMel()(clips[17:18]), atol=0, rtol=0)


def test_frame_t_is_centred_at_10_ms_times_t_plus_1():
    clip = torch.zeros(1, RATE)
    clip[0, 160 * 30] = 1.0  # 300 ms
    energy = LogMel()(clip)[0].exp().sum(1)
    assert int(energy.argmax()) == 29
    torch.testing.assert_close(energy[28], energy[30])


@pytest.mark.parametrize("frequency", [120, 440, 1000, 2500, 6000])
def test_a_tone_peaks_in_its_band(frequency: int):
    mel = 2595 * np.log10(1 + np.array([20.0, 8000.0, frequency]) / 700)
    band = (mel[2] - mel[0]) / ((mel[1] - mel[0]) / 33) - 1
    features = LogMel()(torch.from_numpy(tone(frequency)).float()[None])[0]
    assert abs(float(features[50].argmax()) - band) < 1


def test_the_loudest_and_the_softest_clips_have_finite_features():
    clips = torch.stack([torch.full((RATE,), -32768), torch.zeros(RATE), 32767 * (torch.arange(RATE) % 2 * 2 - 1)])
    features = LogMel()(clips.to(torch.int16))
    assert features.isfinite().all()
    torch.testing.assert_close(features[1], torch.full_like(features[1], math.log(1e-6)))


def test_every_band_hears_something():
    filters = mel_filters()
    assert filters.shape == (201, 32)
    assert (filters.amax(0) > 0.5).all()
    assert (filters >= 0).all()
