"""Clips of a second as examples: classes chosen, samples turned into log-mel features a batch at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from rnn.data.audio import BANDS, RATE, LogMel
from rnn.data.common import Data
from rnn.data.vectors import Standardisation, check_noise

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SILENCE, UNKNOWN = "silence", "unknown"
PARTS = ("train", "validation", "test")

SHIFT = RATE // 10  # samples: training clips are moved by up to 100 ms either way
NOISE_PROBABILITY, NOISE_VOLUME = 0.8, 0.1  # background noise in training: how often, and its greatest factor
STATISTICS_CLIPS = 4096  # mean and deviation of the features come from so many training clips at most
CHUNK = 512  # clips whose features are computed at once


@dataclass(frozen=True, eq=False)
class Recordings:
    """Clips and what is said in them, before classes are chosen and before the clips are read.

    Clip k says `words[labels[k]]` and belongs to `PARTS[parts[k]]` (both int64 [N]). background: int16 [any] for each
    part, empty where there is none. read: returns the waveforms, int16 [N, 16000], and their SHA-256.
    """

    words: tuple[str, ...]
    labels: Tensor
    parts: Tensor
    background: tuple[Tensor, Tensor, Tensor]
    read: Callable[[], tuple[Tensor, str]]


@dataclass(frozen=True, eq=False)
class Clips:
    """Some of the clips that are there: row `rows[k]` of `waveforms`, or, beyond its end, of `more`.

    rows: int64 [n]; waveforms and more: int16 [any, 16000]. Called with int64 [B] it gives int16 [B, 16000].
    """

    rows: Tensor
    waveforms: Tensor
    more: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, indices: Tensor) -> Tensor:
        rows, count = self.rows[indices], len(self.waveforms)
        stored = rows < count
        clips = torch.empty(len(rows), RATE, dtype=torch.int16)
        clips[stored] = self.waveforms[rows[stored]]
        clips[~stored] = self.more[rows[~stored] - count]
        return clips


@dataclass(frozen=True, eq=False)
class Speech:
    """The log-mel features of `clips`. See `common.Examples`: x is [B, 99, 32], standardised; lengths are None.

    With `augment` a clip is moved by up to 100 ms, in four of five cases mixed with a piece of `background` (int16
    [any]) of a volume up to 0.1, and normal noise of standard deviation `noise` is added to the features. Without,
    features are computed once, for all clips, and kept on the device that was asked for.
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

    def batch(
        self, indices: Tensor, *, augment: bool, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, None, Tensor]:
        labels, front_end = self.labels[indices].to(device), self._front_end(device)
        if not augment:
            if str(device) not in self._features:
                self._features[str(device)] = torch.cat(list(features(self.clips, front_end, device)))
            return self._features[str(device)][indices.to(device)], None, labels
        x = front_end(self._augmented(self.clips(indices), generator, device))
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator, device=generator.device).to(device)
        return x, None, labels

    def _augmented(self, clips: Tensor, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Samples between about -1 and 1, float32 [B, 16000] on `device`."""

        def draw() -> Tensor:
            return torch.rand(len(clips), 1, generator=generator, device=generator.device, dtype=torch.float64).cpu()

        time = torch.arange(RATE)
        moved = F.pad(clips, (SHIFT, SHIFT)).gather(1, (draw() * (2 * SHIFT + 1)).long() + time)
        samples = moved.to(device).float() / 32768
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
    """The features of every `every`-th clip, in their order: float32 [some, 99, 32] on `device`, chunk by chunk."""
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
    """Choose classes from `recordings`.

    `words` None: the ten words of the published task, then the classes silence and unknown; ("all",): every word, and
    nothing else; others: those, silence and unknown. In each part silence and unknown get as many examples as a chosen
    word has on average, which for ten words is the published tenth; which ones, `seed` decides: silence is a piece of
    that part's background noise at a random volume, unknown a clip of a word that was not chosen.

    Features are standardised by band with the mean and deviation of (up to 4,096, evenly spaced) training clips. Raises
    ValueError for words that are not there, a class without clips in a part, silence without background noise: before
    the clips are read, which may take minutes.
    """
    check_noise(noise)
    everything = words == ("all",)
    chosen = recordings.words if everything else _chosen(recordings, name, WORDS if words is None else words)
    class_of = torch.full((len(recordings.words),), -1)
    class_of[[recordings.words.index(word) for word in chosen]] = torch.arange(len(chosen))
    classes = class_of[recordings.labels]
    generator = torch.Generator().manual_seed(seed)
    rows, labels, silence, silent = {}, {}, [], len(recordings.labels)
    for number, part in enumerate(PARTS):
        here = recordings.parts == number
        known = torch.nonzero(here & (classes >= 0))[:, 0]
        rows[part], labels[part] = known, classes[known]
        if not everything:
            count = math.ceil(len(known) / len(chosen))
            others = torch.nonzero(here & (classes < 0))[:, 0]
            unknown = others[torch.randperm(len(others), generator=generator)[:count]].sort().values
            silence.append(_silence(recordings.background[number], count, generator))
            rows[part] = torch.cat([known, torch.arange(silent, silent + count), unknown])
            extra = torch.tensor([len(chosen)] * count + [len(chosen) + 1] * len(unknown), dtype=torch.int64)
            labels[part] = torch.cat([labels[part], extra])
            silent += count
    class_names = chosen if everything else (*chosen, SILENCE, UNKNOWN)
    _check_classes(labels, class_names, name)
    more = torch.cat([*silence, torch.empty(0, RATE, dtype=torch.int16)])
    waveforms, digest = recordings.read()
    clips = {part: Clips(rows[part], waveforms, more) for part in PARTS}
    every = math.ceil(len(clips["train"]) / STATISTICS_CLIPS)
    # The statistics do not depend on the device that trains later, so they need not be kept there.
    sample = torch.cat([chunk.cpu() for chunk in features(clips["train"], LogMel(device), device, every)])
    standardise = Standardisation.of(sample, None)
    examples = {part: Speech(clips[part], labels[part], recordings.background[0], standardise, noise) for part in PARTS}
    options = {"notes": {"sha256": digest}, "standardisation": standardise, **examples}
    return Data(name=name, class_names=class_names, input_size=BANDS, **options)


def _chosen(recordings: Recordings, name: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """`words`, checked."""
    there = ", ".join(recordings.words)
    if not words:
        raise ValueError(f"{name}: no words are named; its words are {there}")
    for word in words:
        if word in ("all", SILENCE, UNKNOWN):
            raise ValueError(
                f"{name}: {word!r} cannot be one of several words (silence and unknown come by themselves)"
            )
        if word not in recordings.words:
            raise ValueError(f"{name} has no word {word!r}; its words are {there} ('all' takes them all)")
        if words.count(word) > 1:
            raise ValueError(f"{name}: the word {word!r} is named twice")
    if len(words) == len(recordings.words):
        raise ValueError(f"{name}: all of its words are named, which leaves none for the class unknown: use 'all'")
    if not all(len(noise) for noise in recordings.background):
        raise ValueError(f"{name} has no background noise, of which the class silence is made: use the words 'all'")
    return words


def _silence(background: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int16 [count, 16000]: pieces of `background`, at volumes between 0 and 1."""
    starts, volumes = torch.rand(2, count, 1, generator=generator, dtype=torch.float64)
    pieces = background[(starts * (len(background) - RATE + 1)).long() + torch.arange(RATE)]
    return (pieces * volumes).round().to(torch.int16)


def _check_classes(labels: dict[str, Tensor], class_names: tuple[str, ...], name: str) -> None:
    if len(class_names) < 2:
        raise ValueError(f"{name} has one word, {class_names[0]!r}: telling words apart takes two")
    for part in PARTS:
        counts = torch.bincount(labels[part], minlength=len(class_names))
        if not counts.all():
            raise ValueError(f"{name}: the class {class_names[int(counts.argmin())]!r} has no clip for {part}")
