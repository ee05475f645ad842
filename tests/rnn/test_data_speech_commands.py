"""A folder in the layout of Speech Commands: parts, classes, faults, cache and augmentation."""

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton.rnn.data import words_of
from str_triton.rnn.data.audio import RATE, LogMel, write_wav
from str_triton.rnn.data.clips import SHIFT, Speech
from str_triton.training.fingerprint import Fingerprint
from tests.messages import holds
from tests.rnn.speech_folder import PER_PART, TEN, make, read, refuse, sound


def batch(examples: object, indices: torch.Tensor | None = None, augment: bool = False, seed: int = 0) -> tuple:
    indices = torch.arange(len(examples)) if indices is None else indices
    return examples.batch(indices, augment=augment, generator=torch.Generator().manual_seed(seed), device="cpu")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make(tmp_path / "small", ("bed", "cat", "dog"))


def test_parts_are_those_of_the_lists(small: Path):
    data = read(small)
    assert (data.class_names, data.num_classes, data.input_size) == (("bed", "cat", "dog"), 3, 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 6, 6)
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # Files are numbered 0 ... 7 within a word: 4 for training, 2 for validation, 2 for testing.
    expected = torch.stack([torch.from_numpy(sound(number)) for number in (6, 7, 14, 15, 22, 23)])
    assert torch.equal(data.test.clips(torch.arange(6)), expected)


def test_features_are_log_mels_standardised_by_the_training_clips(small: Path):
    data = read(small)
    x, lengths, labels = batch(data.train)
    assert (x.shape, x.dtype, lengths) == ((12, 99, 32), torch.float32, None)
    assert torch.equal(labels, data.train.labels)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 1), correction=0), torch.ones(32), atol=1e-4, rtol=0)
    plain = LogMel()(data.train.clips(torch.arange(12)))
    mean, std = plain.mean((0, 1)), plain.std((0, 1), correction=0)
    y, _, _ = batch(data.test, torch.tensor([3, 1]))
    expected = (LogMel()(data.test.clips(torch.tensor([3, 1]))) - mean) / std
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_ten_words_silence_and_unknown(tmp_path: Path):
    root = make(tmp_path / "set", (*TEN, "bird", "tree"))
    data = read(root, None)
    assert data.class_names == (*TEN, "silence", "unknown")
    for part, per_word in PER_PART.items():
        examples = getattr(data, part)
        assert torch.bincount(examples.labels).tolist() == [per_word] * 12
    unknown = torch.nonzero(data.train.labels == 11)[:, 0]
    others = [sound(number).tobytes() for number in range(80, 96)]
    assert all(clip.numpy().tobytes() in others for clip in data.train.clips(unknown))


def test_silence_is_that_parts_own_stretch_of_background_noise(small: Path):
    data = read(small, ("bed", "cat"))
    rain = sound(999, 20 * RATE).astype(float)
    for part, low, high in (("train", 0, 0.8), ("validation", 0.8, 0.9), ("test", 0.9, 1.0)):
        examples = getattr(data, part)
        clips = examples.clips(torch.nonzero(examples.labels == 2)[:, 0]).numpy().astype(float)
        assert len(clips) == PER_PART[part]
        for clip in clips:
            spectrum = np.fft.rfft(rain) * np.fft.rfft(clip, len(rain)).conj()
            found = np.fft.irfft(spectrum, len(rain))[: len(rain) - RATE + 1]  # the correlation at each start
            start, energy = int(found.argmax()), np.square(rain[found.argmax() :][:RATE]).sum()
            assert low * len(rain) <= start <= high * len(rain) - RATE
            volume = found.max() / energy
            assert 0 < volume <= 1
            assert np.abs(clip - volume * rain[start : start + RATE]).max() <= 0.51


def test_the_seed_chooses_silence_and_unknown(small: Path):
    first, again, other = (read(small, ("bed", "cat"), seed=seed) for seed in (0, 0, 1))
    whole = torch.arange(len(first.train))
    assert torch.equal(first.train.clips(whole), again.train.clips(whole))
    assert not torch.equal(first.train.clips(whole), other.train.clips(whole))
    assert torch.equal(
        first.train.clips(whole[:8]), other.train.clips(whole[:8])
    )  # the clips of words do not depend on the seed


def test_exchanged_clips_and_other_background_noise_are_other_data(small: Path):
    def fingerprint(part: str) -> Fingerprint:
        examples: Speech = getattr(read(small), part)
        return Fingerprint.of(examples.labels, examples.stored)

    began = fingerprint("test")
    assert began.change(fingerprint("test"), "test") is None
    first, second = small / "bed" / "t006.wav", small / "cat" / "t014.wav"
    first.rename(small / "other.wav")
    second.rename(first)
    (small / "other.wav").rename(second)
    now = fingerprint("test")
    assert holds(began.change(now, "test"), "in 2 of 6 sampled test examples")
    write_wav(small / "_background_noise_" / "rain.wav", sound(998, 20 * RATE))
    assert holds(now.change(fingerprint("test"), "test"), "in 1 of 6")


def test_augmentation_belongs_to_its_generator(small: Path):
    data = read(small, noise=0.1)
    some = torch.tensor([3, 7, 7])
    first, again, other = (batch(data.train, some, augment=True, seed=seed)[0] for seed in (1, 1, 2))
    assert first.shape == (3, 99, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[1], first[2])
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    data.train.batch(some, augment=False, generator=generator, device="cpu")
    assert torch.equal(generator.get_state(), before)


def test_a_training_clip_is_moved_by_up_to_100_ms_and_mixed_with_soft_noise(small: Path):
    data = read(small)
    clips = torch.zeros(400, RATE, dtype=torch.int16)
    clips[:, RATE // 2] = 32767
    mixed = data.train._augment(clips, torch.Generator().manual_seed(0), "cpu")
    shifts = RATE // 2 - mixed.argmax(1)
    assert -SHIFT <= int(shifts.min()) < -0.9 * SHIFT
    assert 0.9 * SHIFT < int(shifts.max()) <= SHIFT
    mixed.scatter_(1, mixed.argmax(1, keepdim=True), 0)
    assert 0.7 < float((mixed != 0).any(1).float().mean()) < 0.9
    loudest = 0.1 * 8000 / 32768
    assert 0.8 * loudest < float(mixed.abs().max()) <= loudest


def test_noise_on_the_features_has_its_deviation(tmp_path: Path):
    root = make(tmp_path / "set", ("bed", "cat"), background=False)
    noisy, clean = read(root, noise=0.5), read(root)
    some = torch.zeros(64, dtype=torch.int64)
    difference = batch(noisy.train, some, augment=True)[0] - batch(clean.train, some, augment=True)[0]
    assert abs(float(difference.std()) - 0.5) < 0.01
    assert torch.equal(batch(noisy.test)[0], batch(clean.test)[0])
    with pytest.raises(ValueError, match=r"noise -1\.0"):
        read(root, noise=-1.0)


def test_the_cache_serves_and_a_damaged_one_is_made_anew(small: Path, monkeypatch: pytest.MonkeyPatch):
    whole = torch.arange(12)
    expected, digest = read(small).train.clips(whole), read(small).notes["sha256"]
    monkeypatch.setattr("str_triton.rnn.data.speech_commands.read_wav", lambda path: pytest.fail(f"{path} is read"))
    (small / "_background_noise_" / "rain.wav").rename(small / "rain")
    assert torch.equal(read(small).train.clips(whole), expected)
    monkeypatch.undo()
    (kept,) = (small.parent / "cache" / "clips").glob("*.int16")
    content = kept.read_bytes()
    for damaged in (content[:-2], content[:5000] + b"\1\2" + content[5002:], b""):
        kept.write_bytes(damaged)
        again = read(small)
        assert torch.equal(again.train.clips(whole), expected)
        assert again.notes["sha256"] == digest
        assert kept.read_bytes() == content
    next(kept.parent.glob("*.json")).write_text("{")
    assert torch.equal(read(small).train.clips(whole), expected)
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".int16", ".json"]


def test_a_changed_file_is_read_again(small: Path):
    read(small)
    write_wav(small / "bed" / "t006.wav", sound(500))  # a file of the same size
    assert torch.equal(read(small).test.clips(torch.tensor([0]))[0], torch.from_numpy(sound(500)))


def test_a_stopped_reading_leaves_nothing(small: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("str_triton.rnn.data.clip_store.to_one_second", stop)
    with pytest.raises(KeyboardInterrupt):
        read(small)
    assert list((small.parent / "cache" / "clips").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(small: Path):
    (small.parent / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cache/clips cannot be written"):
        read(small)


def test_odd_clips_are_made_fit_and_named_once(small: Path, capfd: pytest.CaptureFixture):
    rate8 = (sound(1, 8001)[1:] + sound(1, 8001)[:-1]) // 2  # no content at 4 kHz, the Nyquist frequency
    stereo, long = np.stack([sound(2), sound(3)], 1), sound(4, 3 * RATE)
    write_wav(small / "bed" / "t006.wav", rate8, 8000)
    write_wav(small / "bed" / "t007.wav", rate8, 8000)
    with wave.open(str(small / "cat" / "t014.wav"), "wb") as file:
        file.setnchannels(2)
        file.setframerate(RATE)
        file.setsampwidth(2)
        file.writeframes(stereo.tobytes())
    write_wav(small / "cat" / "t015.wav", long)
    write_wav(small / "dog" / "t022.wav", sound(5, 100))
    for _ in range(2):  # the second time it is read from the cache
        clips = read(small).test.clips(torch.arange(6))
        facts = ("16000 Hz .. resampled: 2", "stereo .. one channel: 1", "a second .. cut: 1")
        for line, parts in zip(capfd.readouterr().err.splitlines(), facts, strict=True):
            assert holds(line, f"warning: speech-commands:{small} .. {parts}")
    near = torch.from_numpy(rate8).float()
    assert (clips[0, ::2].float() - near)[100:-100].abs().max() < 20  # every second sample is an original one
    assert (clips[2].float() - torch.from_numpy(stereo.mean(1)).float()).abs().max() <= 0.5
    assert torch.equal(clips[3], torch.from_numpy(long[:RATE]))
    assert torch.equal(clips[4, :100], torch.from_numpy(sound(5, 100)))
    assert not clips[4, 100:].any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:1000], "is truncated: .*956.* 32000"),
        (lambda content: content[:40] + struct.pack("<I", 0), "is empty"),
        (lambda content: b"ID3" + content, "is not a WAV file"),
    ],
)
def test_a_damaged_clip_is_named(small: Path, damage: object, message: str):
    clip = small / "cat" / "t014.wav"
    clip.write_bytes(damage(clip.read_bytes()))
    refuse(small, f"cat/t014.wav {message}")
    assert not list((small.parent / "cache" / "clips").iterdir())


def test_words_that_make_no_classes(tmp_path: Path, small: Path):
    there = "its words are bed, cat, dog"
    refuse(small, f"has no word 'yes'; {there}", None)
    refuse(small, f"has no word 'rat'; {there}", ("bed", "rat"))
    refuse(small, "the word 'bed' is named twice", ("bed", "bed"))
    refuse(small, "'all' cannot be one of several words", ("all", "bed"))
    refuse(small, "'silence' cannot be one of several words", ("bed", "silence"))
    refuse(small, "class unknown .*'all'", ("dog", "cat", "bed"))
    refuse(small, f"no words are named; {there}", ())
    refuse(make(tmp_path / "quiet", ("bed", "cat"), background=False), "no background noise", ("bed",))
    refuse(make(tmp_path / "one", ("bed",)), "has one word, 'bed'")


@pytest.mark.gpu
def test_a_gpu_computes_the_same_features(small: Path):
    data = read(small, noise=0.1)
    on_gpu = read(small, noise=0.1, device="cuda")
    for augment in (False, True):
        some, options = torch.tensor([5, 0, 5]), {"augment": augment}
        expected, _, _ = data.train.batch(some, generator=torch.Generator().manual_seed(1), device="cpu", **options)
        x, lengths, labels = on_gpu.train.batch(
            some, generator=torch.Generator().manual_seed(1), device="cuda", **options
        )
        assert (x.device.type, labels.device.type, lengths) == ("cuda", "cuda", None)
        torch.testing.assert_close(x.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_spaces_around_words_are_left_out() -> None:
    assert words_of("up, down ,no") == ("up", "down", "no")
