"""Clips of one second as examples: the choice of classes, augmentation, and log-mel features."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from str_triton.rnn.data.audio import BANDS, RATE, LogMel
from str_triton.rnn.data.common import Data
from str_triton.rnn.data.vectors import Standardisation, check_noise

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SILENCE, UNKNOWN = "silence", "unknown"
PARTS = ("train", "validation", "test")

SHIFT = RATE // 10  # samples; training shifts a clip by up to 100 ms in either direction
NOISE_PROBABILITY, NOISE_VOLUME = 0.8, 0.1  # background noise in training: its probability and its maximum factor
STATISTICS_CLIPS = 4096  # the maximum number of training clips that mean and deviation are computed from
CHUNK = 512  # clips whose features are computed at once


@dataclass(frozen=True, eq=False)
class Recordings:
    """Clips and their words, before classes are chosen and before the clips are read.

    Clip k says `words[labels[k]]` and belongs to `PARTS[parts[k]]` (both int64 [N]). background: the background noise
    of each part, int16 [any], empty where a part has none. read: returns the waveforms, int16 [N, 16000], and their
    SHA-256.
    """

    words: tuple[str, ...]
    labels: Tensor
    parts: Tensor
    background: tuple[Tensor, Tensor, Tensor]
    read: Callable[[], tuple[Tensor, str]]


@dataclass(frozen=True, eq=False)
class Clips:
    """A selection of clips: clip k is row `rows[k]` of `waveforms` and `generated`, concatenated.

    rows: int64 [n]; waveforms and generated: int16 [any, 16000]. Call it with indices, int64 [B], to get the clips,
    int16 [B, 16000].
    """

    rows: Tensor
    waveforms: Tensor
    generated: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, indices: Tensor) -> Tensor:
        rows, count = self.rows[indices], len(self.waveforms)
        stored = rows < count
        clips = torch.empty(len(rows), RATE, dtype=torch.int16)
        clips[stored] = self.waveforms[rows[stored]]
        clips[~stored] = self.generated[rows[~stored] - count]
        return clips


@dataclass(frozen=True, eq=False)
class Speech:
    """The log-mel features of `clips`. See `common.Examples`: x is [B, 99, 32], standardised; lengths are None.

    `augment` shifts a clip by up to 100 ms, mixes four of five clips with a piece of `background` (int16 [any]) at a
    volume of up to 0.1, and adds normal noise of standard deviation `noise` to the features. Without `augment` the
    features of all clips are computed once and kept on the device.
    """

    clips: Clips
    labels: Tensor
    background: Tensor
    standardisation: Standardisation
    noise: float
    _front_ends: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict, init=False)
    _features: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.clips)

    def stored(self, index: int) -> bytes:
        clip = self.clips(torch.tensor([index])).numpy().tobytes()
        return clip if index else clip + self.background.numpy().tobytes()  # the noise counts once

    def batch(
        self, indices: Tensor, *, augment: bool, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, None, Tensor]:
        labels, front_end = self.labels[indices].to(device), self._front_end(device)
        if not augment:
            if str(device) not in self._features:
                self._features[str(device)] = torch.cat(list(features(self.clips, front_end, device)))
            return self._features[str(device)][indices.to(device)], None, labels
        x = front_end(self._augment(self.clips(indices), generator, device))
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator, device=generator.device).to(device)
        return x, None, labels

    def _augment(self, clips: Tensor, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Shift clips and add background noise: samples of about -1 ... 1, float32 [B, 16000] on `device`."""

        def draw() -> Tensor:
            return torch.rand(len(clips), 1, generator=generator, device=generator.device, dtype=torch.float64).cpu()

        time = torch.arange(RATE)
        shifted = F.pad(clips, (SHIFT, SHIFT)).gather(1, (draw() * (2 * SHIFT + 1)).long() + time)
        samples = shifted.to(device).float() / 32768
        if len(self.background):
            volumes = (draw() < NOISE_PROBABILITY) * draw() * NOISE_VOLUME
            pieces = self.background[(draw() * (len(self.background) - RATE + 1)).long() + time]
            samples += volumes.float().to(device) * (pieces.to(device).float() / 32768)
        return samples

    def _front_end(self, device: torch.device | str) -> Callable[[Tensor], Tensor]:
        if str(device) not in self._front_ends:
            mean, std = self.standardisation.mean.to(device), self.standardisation.std.to(device)
            log_mel = LogMel(device)
            self._front_ends[str(device)] = lambda samples: log_mel(samples).sub_(mean).div_(std)
        return self._front_ends[str(device)]


def features(
    clips: Clips, front_end: Callable[[Tensor], Tensor], device: torch.device | str, every: int = 1
) -> Iterator[Tensor]:
    """Yield the features of every `every`-th clip in chunks, float32 [up to CHUNK, 99, 32] on `device`."""
    for chunk in torch.arange(0, len(clips), every).split(CHUNK):
        yield front_end(clips(chunk).to(device))


def speech_data(
    recordings: Recordings,
    name: str,
    *,
    words: tuple[str, ...] | None,
    seed: int,
    noise: float,
    device: torch.device | str,
) -> Data:
    """Make a data set with the classes `words` from `recordings`.

    words: None for the ten words of the published task, silence and unknown; ("all",) for every word and no other
    class; any other tuple for these words, silence and unknown. An example of silence is a piece of the part's
    background noise at a random volume. An example of unknown is a clip of a word that was not chosen. In each part
    silence and unknown get as many examples as a chosen word has on average; `seed` selects them. For ten words that is
    the published tenth.

    Each mel band is standardised with the mean and deviation of up to 4,096 evenly spaced training clips. Raises
    ValueError for unknown words, a class without clips in a part, and silence without background noise. These checks
    come before the clips are read, which may take minutes.
    """
    check_noise(noise)
    everything = words == ("all",)
    chosen = recordings.words if everything else _check_words(recordings, name, WORDS if words is None else words)
    class_of = torch.full((len(recordings.words),), -1)
    class_of[[recordings.words.index(word) for word in chosen]] = torch.arange(len(chosen))
    classes = class_of[recordings.labels]
    rows, labels, generated = _examples(recordings, classes, 0 if everything else len(chosen), seed)
    class_names = chosen if everything else (*chosen, SILENCE, UNKNOWN)
    _check_classes(labels, class_names, name)
    waveforms, digest = recordings.read()
    clips = {part: Clips(rows[part], waveforms, generated) for part in PARTS}
    every = math.ceil(len(clips["train"]) / STATISTICS_CLIPS)
    # The statistics are moved to the device that trains later, so the features of the sample need not stay on `device`.
    sample = torch.cat([chunk.cpu() for chunk in features(clips["train"], LogMel(device), device, every)])
    standardise = Standardisation.of(sample, None)
    examples = {part: Speech(clips[part], labels[part], recordings.background[0], standardise, noise) for part in PARTS}
    return Data(
        name=name,
        class_names=class_names,
        input_size=BANDS,
        train=examples["train"],
        validation=examples["validation"],
        test=examples["test"],
        notes={"sha256": digest},
        standardisation=standardise,
    )


def _examples(
    recordings: Recordings, classes: Tensor, chosen: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the rows and the labels of each part, and the waveforms of silence, whose rows follow those of the clips.

    Args:
        recordings: the clips.
        classes: the class of each clip; -1 for a word that was not chosen.
        chosen: the number of chosen words, if silence and unknown are classes after theirs; else 0.
        seed: selects the examples of silence and unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, labels, silence, next_row = {}, {}, [], len(recordings.labels)
    for number, part in enumerate(PARTS):
        here = recordings.parts == number
        known = torch.nonzero(here & (classes >= 0))[:, 0]
        rows[part], labels[part] = known, classes[known]
        if chosen:
            count = math.ceil(len(known) / chosen)
            others = torch.nonzero(here & (classes < 0))[:, 0]
            unknown = others[torch.randperm(len(others), generator=generator)[:count]].sort().values
            silence.append(_silence(recordings.background[number], count, generator))
            rows[part] = torch.cat([known, torch.arange(next_row, next_row + count), unknown])
            extra = torch.tensor([chosen] * count + [chosen + 1] * len(unknown), dtype=torch.int64)
            labels[part] = torch.cat([labels[part], extra])
            next_row += count
    return rows, labels, torch.cat([*silence, torch.empty(0, RATE, dtype=torch.int16)])


def _check_words(recordings: Recordings, name: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """Return `words`; raise ValueError where they do not fit the recordings."""
    known = ", ".join(recordings.words)
    if not words:
        raise ValueError(f"{name}: no words are named; its words are {known}")
    for word in words:
        if word in ("all", SILENCE, UNKNOWN):
            raise ValueError(
                f"{name}: {word!r} cannot be one of several words (silence and unknown are always classes)"
            )
        if word not in recordings.words:
            raise ValueError(f"{name} has no word {word!r}; its words are {known} ('all' selects all of them)")
        if words.count(word) > 1:
            raise ValueError(f"{name}: the word {word!r} is named twice")
    if len(words) == len(recordings.words):
        raise ValueError(f"{name}: all words are named and the class unknown has none left: use 'all'")
    if not all(len(noise) for noise in recordings.background):
        raise ValueError(
            f"{name} has no background noise, which the class silence needs: add recordings of noise "
            "(_background_noise_/*.wav, a few seconds or more), or do without the class, by --words all"
        )
    return words


def _silence(background: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw pieces of `background` at volumes between 0 and 1, int16 [count, 16000]."""
    starts, volumes = torch.rand(2, count, 1, generator=generator, dtype=torch.float64)
    pieces = background[(starts * (len(background) - RATE + 1)).long() + torch.arange(RATE)]
    return (pieces * volumes).round().to(torch.int16)


def _check_classes(labels: dict[str, Tensor], class_names: tuple[str, ...], name: str) -> None:
    if len(class_names) < 2:
        raise ValueError(f"{name} has one word, {class_names[0]!r}: at least two are needed")
    for part in PARTS:
        counts = torch.bincount(labels[part], minlength=len(class_names))
        if not counts.all():
            raise ValueError(f"{name}: the class {class_names[int(counts.argmin())]!r} has no clip for {part}")
