"""Synthetic speech: a folder of clips made by eSpeak NG, with different speakers for training and testing."""

import contextlib
import csv
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from str_triton.rnn.data import espeak_worker
from str_triton.rnn.data.audio import RATE, resample, to_int16, write_wav
from str_triton.rnn.data.clip_store import cache_root
from str_triton.rnn.data.common import Data
from str_triton.rnn.data.progress import with_progress
from str_triton.rnn.data.speech_commands import load_speech_commands

CLIPS_PER_WORD = 300
VERSION = 1  # of the way in which clips are made; another version makes new folders
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}

ACCENTS = (
    *("en", "en-us", "en-us-nyc", "en-029", "en-gb-scotland"),
    *("en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
)
# A variant of eSpeak stands for a speaker. Robots and whispers are left out. Variants of one family stay in one part.
SPEAKERS = {
    "train": (
        *("f1", "f2", "f4", "m1", "m2", "m3", "m6", "m8", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "klatt6"),
        *("Alex", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Lee", "Marco", "Mario", "Mike", "mike2"),
        *("Nguyen", "Reed", "RicishayMax", "adam", "anika", "announcer", "antonio", "aunty", "belinda", "benjamin"),
        *("caleb", "ed", "edward", "edward2", "grandpa", "gustave", "ian", "iven", "iven2", "iven3", "iven4", "john"),
        *("kaukovalta", "marcelo", "max", "michel", "miguel", "norbert", "pablo", "pedro", "quincy", "robert"),
        *("sandro", "steph", "steph2", "steph3"),
    ),
    "validation": ("f5", "m5", "Annie", "Michael", "david", "grandma", "rob", "victor"),
    "test": (
        "f3",
        "m4",
        "m7",
        "Alicia",
        "Andrea",
        "Andy",
        "Jacky",
        "boris",
        "linda",
        "paul",
        "shelby",
        "travis",
        "zac",
    ),
}
SPEEDS, PITCHES, RANGES = (120, 240), (25, 75), (20, 80)  # words a minute; eSpeak's scales from 0 to 99
FASTEST = 450
NOISE_RATIOS = (0.0, 20.0)  # dB: the signal-to-noise ratio
LEVELS = (-15.0, -1.0)  # dB: the loudest sample relative to full scale
NOISES = ("white", "pink", "hum")
NOISE_SECONDS = 30
TRIM, TRIM_MARGIN = 0.01, RATE // 100  # samples under a hundredth of the peak are silence; 10 ms of it are kept


class Clip(NamedTuple):
    """The settings that a clip was made with: a line of clips.csv."""

    file: str
    part: str
    voice: str
    speed: int
    pitch: int
    pitch_range: int
    noise: str
    noise_ratio: float


def load_spoken(
    words: tuple[str, ...],
    *,
    seed: int = 0,
    noise: float = 0.0,
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
    clips_per_word: int = CLIPS_PER_WORD,
) -> Data:
    """Make clips of `words` with `make_spoken` and read them with `load_speech_commands`; the classes are the words.

    noise: standard deviation of the noise that training adds to the standardised features.
    """
    folder = make_spoken(words, seed=seed, cache_dir=cache_dir, clips_per_word=clips_per_word)
    data = load_speech_commands(str(folder), words=("all",), seed=seed, noise=noise, device=device, cache_dir=cache_dir)
    made = f"speech synthesised by eSpeak NG, seed {seed}; no speaker of one part is in another"
    return replace(data, name=f"spoken:{','.join(data.class_names)}", notes={**data.notes, "made": made})


def make_spoken(
    words: tuple[str, ...], *, seed: int = 0, cache_dir: str | None = None, clips_per_word: int = CLIPS_PER_WORD
) -> Path:
    """Make a folder in the layout of Speech Commands in the cache and return its path. The same arguments reuse it.

    Each clip is one second at 16 kHz: a word by a random speaker with a random accent, speed, pitch and pitch range, at
    a random position and level. White noise, pink noise or mains hum lies 0 to 20 dB below the word, because the task
    would be too easy without noise. 70 % of a word's clips are for training, 10 % for validation and 20 % for testing.
    The parts share accents, but no speaker. `_background_noise_` holds half a minute of each noise; clips.csv holds the
    settings of every clip. The same words, seed and versions of eSpeak and numpy give the same files, bit for bit.

    Raises ValueError for fewer than two words, a word with other letters than a to z, a word that takes longer than a
    second, fewer than ten clips a word, and a missing eSpeak NG.
    """
    words = _check_words(words, clips_per_word)
    root = cache_root(cache_dir) / "spoken"
    key = hashlib.sha256(repr((VERSION, words, seed, clips_per_word)).encode()).hexdigest()[:12]
    folder = root / f"{'-'.join(words)[:60]}-{key}"
    if folder.is_dir():
        return folder
    found = espeak_worker.find_library()
    if found is None:
        raise ValueError("spoken: needs eSpeak NG: pip install espeakng-loader, or the system's espeak-ng")
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    try:
        with Speaker(*found, seed) as speaker:
            _write_clips(unfinished, words, seed, clips_per_word, speaker)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it exists, another process has made the same folder
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _check_words(words: tuple[str, ...], clips_per_word: int) -> tuple[str, ...]:
    """Return the words in lower case and alphabetic order; raise ValueError for words that cannot be spoken."""
    words = tuple(word.strip().lower() for word in words)
    for word in words:
        if not re.fullmatch("[a-z]+", word):
            raise ValueError(f"spoken: {word!r} is not a word of the letters a to z")
    if len(set(words)) < len(words):
        raise ValueError(f"spoken: {max(words, key=words.count)!r} is named twice")
    if len(words) < 2:
        raise ValueError(f"spoken: {len(words)} word is not enough: name two or more")
    if clips_per_word < 10:
        raise ValueError(f"spoken: {clips_per_word} clips a word: at least 10 are needed for three parts")
    return tuple(sorted(words))


class Speaker:
    """A process that runs eSpeak NG; see espeak_worker.py."""

    def __init__(self, library: str, data: str, seed: int) -> None:
        self.library = library
        self.errors = tempfile.TemporaryFile()  # a pipe that nothing reads would block the process when it is full
        # -I keeps the worker's folder and the user's environment out of the worker's import path.
        command = [sys.executable, "-I", espeak_worker.__file__, library, data, str(seed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        try:
            self.rate = self._read_number()
            if self.rate <= 0:
                raise ValueError(f"spoken: eSpeak NG ({library}) found no data: is its package complete?")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Speaker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def say(self, word: str, voice: str, speed: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Speak a word: float64 [frames] at 16 kHz with peak 1, without the silence around it."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended: `_read_number` reports it
            self.process.stdin.write(f"{voice} {speed} {pitch} {pitch_range} {word}\n".encode())
            self.process.stdin.flush()
        count = self._read_number()
        if count < 0:
            raise ValueError(f"spoken: eSpeak NG ({self.library}) has no voice {voice!r}: it may be too old")
        samples = np.frombuffer(self.process.stdout.read(count), np.int16) / 32768
        sound = resample(samples, self.rate)
        peak = np.abs(sound).max(initial=0.0)
        if peak == 0:
            raise ValueError(f"spoken: eSpeak NG gives no sound for the word {word!r}")
        loud = np.flatnonzero(np.abs(sound) > TRIM * peak)
        return sound[max(0, loud[0] - TRIM_MARGIN) : loud[-1] + TRIM_MARGIN] / peak

    def _read_number(self) -> int:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").split("\n")
            cause = next((line.strip() for line in reversed(lines) if line.strip()), "it ended")
            raise ValueError(f"spoken: eSpeak NG ({self.library}) does not work here: {cause}")
        return int(line)


def _write_clips(folder: Path, words: tuple[str, ...], seed: int, clips_per_word: int, speaker: Speaker) -> None:
    """Write all files of the folder."""
    random = np.random.default_rng(seed)
    noise_folder = folder / "_background_noise_"
    noise_folder.mkdir()
    for kind in NOISES:
        write_wav(noise_folder / f"{kind}.wav", to_int16(0.1 * make_noise(kind, NOISE_SECONDS * RATE, random)))
    plans = list(_plan_clips(words, clips_per_word, random))
    for clip in with_progress(plans, "speaking"):
        word = clip.file.split("/")[0]
        (folder / word).mkdir(exist_ok=True)
        write_wav(folder / clip.file, _make_clip(word, clip, speaker, random))
    for part, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        (folder / name).write_text("".join(f"{clip.file}\n" for clip in plans if clip.part == part))
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Clip._fields)
        writer.writerows(plans)


def _plan_clips(words: tuple[str, ...], clips_per_word: int, random: np.random.Generator) -> Iterator[Clip]:
    """Yield the settings of each clip. Speakers take turns, so each speaker says each word about equally often."""
    for word in words:
        held_out = {part: round(SHARES[part] * clips_per_word) for part in ("validation", "test")}
        counts = {"train": clips_per_word - sum(held_out.values()), **held_out}
        for part, count in counts.items():
            turns = [
                speaker
                for _ in range(-(-count // len(SPEAKERS[part])))
                for speaker in random.permutation(SPEAKERS[part])
            ]
            for number, speaker in enumerate(turns[:count]):
                voice = f"{random.choice(ACCENTS)}+{speaker}"
                speed, pitch, pitch_range = (int(random.integers(*limits)) for limits in (SPEEDS, PITCHES, RANGES))
                ratio = round(float(random.uniform(*NOISE_RATIOS)), 2)
                file = f"{word}/{voice}_nohash_{number}.wav"
                yield Clip(file, part, voice, speed, pitch, pitch_range, str(random.choice(NOISES)), ratio)


def _make_clip(word: str, clip: Clip, speaker: Speaker, random: np.random.Generator) -> np.ndarray:
    """Make a clip's samples, int16 [16000]."""
    speed = clip.speed
    sound = speaker.say(word, clip.voice, speed, clip.pitch, clip.pitch_range)
    while len(sound) > RATE:
        if speed == FASTEST:
            raise ValueError(f"spoken: the word {word!r} takes longer than a second")
        speed = min(FASTEST, round(1.3 * speed))
        sound = speaker.say(word, clip.voice, speed, clip.pitch, clip.pitch_range)
    power = np.mean(sound**2)
    mixture = make_noise(clip.noise, RATE, random) * np.sqrt(power / 10 ** (clip.noise_ratio / 10))
    start = random.integers(RATE - len(sound) + 1)
    mixture[start : start + len(sound)] += sound
    return to_int16(mixture / np.abs(mixture).max() * 10 ** (random.uniform(*LEVELS) / 20))


def make_noise(kind: str, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw noise of mean power 1, float64 [count].

    kind: "white", "pink" (power proportional to 1 / frequency above 20 Hz) or "hum" (of the mains).
    """
    noise = random.standard_normal(count)
    if kind == "pink":
        spectrum = np.fft.rfft(noise)
        spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(count, 1 / RATE), 20.0))
        noise = np.fft.irfft(spectrum, count)
    elif kind == "hum":
        noise *= 0.1
        time = np.arange(count) / RATE
        base = random.choice((50.0, 60.0)) * random.uniform(0.998, 1.002)
        for harmonic in range(1, 9):
            strength = random.uniform(0.3, 1.0) / harmonic**0.5
            noise += strength * np.sin(2 * np.pi * (harmonic * base * time + random.uniform()))
    return noise / np.sqrt(np.mean(noise**2))
