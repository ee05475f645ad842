"""Words spoken by eSpeak NG: the same files for a seed, no speaker in two parts, and all errors."""

import csv
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton.rnn.data import load
from str_triton.rnn.data.audio import RATE, read_wav
from str_triton.rnn.data.espeak_worker import find_library
from str_triton.rnn.data.spoken import ACCENTS, NOISES, SPEAKERS, Speaker, load_spoken, make_noise, make_spoken
from tests.messages import holding

needs_espeak = pytest.mark.skipif(
    find_library() is None, reason="needs eSpeak NG: pip install espeakng-loader, or the system's espeak-ng"
)
SMALL = 100  # clips a word: enough for every test speaker to be heard


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return make_spoken(("yes", "no"), cache_dir=str(cache), clips_per_word=SMALL)


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.*")):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "clips.csv").open() as file:
        return list(csv.DictReader(file))


@needs_espeak
def test_the_folder_has_the_published_layout(folder: Path):
    clips = table(folder)
    on_disk = {path.relative_to(folder).as_posix() for path in folder.glob("[!_]*/*.wav")}
    assert {clip["file"] for clip in clips} == on_disk
    for word in ("yes", "no"):
        parts = [clip["part"] for clip in clips if clip["file"].startswith(f"{word}/")]
        assert [parts.count(part) for part in SPEAKERS] == [70, 10, 20]
    for part, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        listed = (folder / name).read_text().split()
        assert sorted(listed) == sorted(clip["file"] for clip in clips if clip["part"] == part)
    assert sorted(path.stem for path in (folder / "_background_noise_").iterdir()) == sorted(NOISES)


@needs_espeak
def test_no_speaker_is_in_two_parts(folder: Path):
    heard = {part: {clip["voice"].split("+")[1] for clip in table(folder) if clip["part"] == part} for part in SPEAKERS}
    assert heard["test"] == set(SPEAKERS["test"])
    assert all(heard[part] <= set(SPEAKERS[part]) for part in SPEAKERS)
    assert not heard["train"] & heard["test"]
    assert not heard["train"] & heard["validation"]
    assert not heard["validation"] & heard["test"]
    assert {clip["voice"].split("+")[0] for clip in table(folder)} == set(ACCENTS)


def test_the_parts_speakers_and_their_families_do_not_overlap():
    families = {part: {name.rstrip("0123456789").lower() for name in SPEAKERS[part]} for part in SPEAKERS}
    for part in families:
        families[part] -= {"f", "m"}  # numbered names, but different speakers
    everyone = [name for part in SPEAKERS for name in SPEAKERS[part]]
    assert len(set(everyone)) == len(everyone)
    assert sum(map(len, families.values())) == len(set.union(*families.values()))


@needs_espeak
def test_clips_are_a_second_of_speech_in_noise(folder: Path):
    powers = []
    for clip in table(folder):
        samples, rate = read_wav(folder / clip["file"])
        assert (samples.shape, rate) == ((RATE, 1), RATE)
        peak = np.abs(samples.astype(float)).max() / 32768
        assert 10 ** (-15.1 / 20) < peak < 10 ** (-0.9 / 20)
        power = np.square(samples[:, 0].astype(float)).reshape(20, -1).mean(1)
        assert power.min() > 0  # there is noise in every part of the clip
        powers.append((float(clip["noise_ratio"]), 10 * np.log10(power.max() / power.min())))
    ratios, ranges = np.array(powers).T
    assert ratios.min() >= 0
    assert ratios.max() <= 20
    assert np.corrcoef(ratios, ranges)[0, 1] > 0.5


@needs_espeak
def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path):
    first, again, other = (
        make_spoken(words, seed=seed, cache_dir=str(tmp_path / place), clips_per_word=20)
        for words, seed, place in ((("stop", "go"), 3, "a"), (("go", "Stop"), 3, "b"), (("stop", "go"), 4, "a"))
    )
    assert digest(first) == digest(again)
    assert table(first) == table(again)
    assert {clip["voice"] for clip in table(first)} != {clip["voice"] for clip in table(other)}


@needs_espeak
def test_it_loads_as_a_data_set(cache: Path, folder: Path):
    data = load_spoken(("yes", "no"), cache_dir=str(cache), clips_per_word=SMALL)
    assert (data.name, data.class_names, data.input_size) == ("spoken:no,yes", ("no", "yes"), 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (140, 20, 40)
    x, _, labels = data.train.batch(torch.arange(140), augment=False, generator=torch.Generator(), device="cpu")
    assert (x[labels == 0].mean((0, 1)) - x[labels == 1].mean((0, 1))).abs().max() > 0.1
    assert "eSpeak NG, seed 0" in data.notes["made"]


@needs_espeak
def test_it_is_made_once(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("str_triton.rnn.data.espeak_worker.find_library", lambda: None)
    assert make_spoken(("no", "yes"), cache_dir=str(cache), clips_per_word=SMALL) == folder


@needs_espeak
def test_what_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = []

    def stop(*details: object) -> None:
        said.append(details)
        if len(said) > 5:
            raise KeyboardInterrupt
        write(*details)

    from str_triton.rnn.data.audio import write_wav as write

    monkeypatch.setattr("str_triton.rnn.data.spoken.write_wav", stop)
    with pytest.raises(KeyboardInterrupt):
        make_spoken(("yes", "no"), cache_dir=str(tmp_path), clips_per_word=10)
    assert list((tmp_path / "spoken").iterdir()) == []


@needs_espeak
def test_a_long_word_is_spoken_faster_and_a_longer_one_refused(tmp_path: Path):
    options = {"cache_dir": str(tmp_path), "clips_per_word": 10}
    samples, _ = read_wav(next(make_spoken(("no", "university"), **options).glob("university/*.wav")))
    assert len(samples) == RATE
    word = 3 * "supercalifragilistic"
    with pytest.raises(ValueError, match=rf"'{word}' .*a second"):
        make_spoken(("no", word), **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("yes,n0", "'n0' .*a to z"),
        ("yes,,no", "'' .*word"),
        ("yes,so so", "'so so' .*word"),
        ("yes,ça", "'ça' .*word"),
        ("yes,no,Yes", "'yes' .*twice"),
        ("yes", r"1 word\b"),
    ],
)
def test_words_that_cannot_be_made(spec: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load(f"spoken:{spec}", cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_too_few_clips(tmp_path: Path):
    with pytest.raises(ValueError, match=r"9 clips .*at least 10"):
        make_spoken(("yes", "no"), cache_dir=str(tmp_path), clips_per_word=9)


def test_without_espeak_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_library() is None
    message = "^spoken: needs eSpeak NG: pip install espeakng-loader, or the system's espeak-ng$"
    with pytest.raises(ValueError, match=message):
        load("spoken:yes,no", cache_dir=str(tmp_path))


def test_the_system_s_library_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so.1")
    assert find_library() == ("libespeak-ng.so.1", "")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    for file in ("bin/espeak-ng", "lib/libespeak-ng.so.1"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_library() == (str(tmp_path / "lib/libespeak-ng.so.1"), "")


def test_a_library_that_does_not_work_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "libespeak-ng.so"
    broken.write_text("no library")
    monkeypatch.setattr("str_triton.rnn.data.espeak_worker.find_library", lambda: (str(broken), ""))
    with pytest.raises(ValueError, match=r"libespeak-ng\.so.* OSError") as caught:
        make_spoken(("yes", "no"), cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "spoken").iterdir()) == []


@needs_espeak
def test_an_espeak_that_ends_on_the_way_is_named(tmp_path: Path):
    with Speaker(*find_library(), 0) as speaker:
        assert len(speaker.say("yes", "en", 175, 50, 50)) > 0
        for voice in ("en+nobody", "en-nowhere+f1"):
            with pytest.raises(ValueError, match=holding(f"'{voice}'")):
                speaker.say("yes", voice, 175, 50, 50)
        speaker.process.kill()
        speaker.process.wait()
        with pytest.raises(ValueError, match=r"does not work here: it ended$"):
            speaker.say("yes", "en", 175, 50, 50)


def test_the_training_process_never_loads_espeak():
    """Check NOTICE's promise: only the worker loads the library, and the worker imports nothing of the project."""
    code = (
        "import sys; from pathlib import Path; from str_triton.rnn.data.spoken import make_spoken\n"
        "import tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    try: make_spoken(('yes', 'no'), cache_dir=folder, clips_per_word=10)\n"
        "    except ValueError: pass\n"
        "assert 'espeakng_loader' not in sys.modules\n"
        "maps = Path('/proc/self/maps')\n"
        "assert not maps.exists() or 'libespeak' not in maps.read_text()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    worker = Path(make_spoken.__code__.co_filename).with_name("espeak_worker.py").read_text()
    assert "rnn" not in worker.replace("nothing of this project", "")
    assert "import torch" not in worker


@pytest.mark.parametrize("kind", NOISES)
def test_noise_has_power_1_and_its_spectrum(kind: str):
    noise = make_noise(kind, 4 * RATE, np.random.default_rng(0))
    assert abs(np.mean(noise**2) - 1) < 1e-9
    power = np.abs(np.fft.rfft(noise)) ** 2 / len(noise)
    low, high = (power[4 * f : 8 * f].mean() for f in (200, 3200))  # octaves
    if kind == "white":
        assert 0.8 < low / high < 1.25
    elif kind == "pink":
        assert 12 < low / high < 20  # four octaves at 3 dB
    else:
        assert power[: 4 * 500].sum() / power.sum() > 0.9
