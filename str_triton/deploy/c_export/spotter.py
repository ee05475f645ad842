"""The C keyword spotter: the log-mel front end, and the logic that turns a classifier's scores into words."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from str_triton.deploy.c_export import demo_template
from str_triton.deploy.c_export import spotter_template as template
from str_triton.deploy.c_export.program import POINTER, Program, Sizes, stack_text
from str_triton.deploy.c_export.text import array, comment, constant, string


@dataclass(frozen=True, eq=False, kw_only=True)
class KeywordSpotter:
    """The features that a classifier of sound was trained on, and the rules by which it reports words.

    A feature is log(energy + floor) in one mel band of a Hann window of sound.

    Attributes:
        rate: samples per second.
        window: samples of a window of sound.
        hop: samples from the beginning of a window to that of the next.
        margin: zeros before the first sample.
        filters: float32 [window // 2 + 1, bands].
        floor: the number that is added to the energy.
        frames: the frames of a clip, as in training.
        stride: frames between the beginnings of two clips.
        smoothing: clips whose probabilities are averaged.
        threshold: the average at which a word is detected.
        longest: clips after which a word is reported although it still lasts.
        quiet: the energy, summed over the bands, of a quiet frame; nothing is reported in `frames` quiet frames.
        ignored: classes that are never reported.

    Raises:
        ValueError: sizes that do not fit.
    """

    rate: int
    window: int
    hop: int
    margin: int
    filters: Tensor
    floor: float
    frames: int
    stride: int
    smoothing: int
    threshold: float
    longest: int
    quiet: float
    ignored: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.window % 4 or not 0 < self.hop <= self.window or not 0 <= self.margin < self.window:
            raise ValueError(
                "window must be a multiple of 4, hop from 1 to window, margin below window; got window "
                f"{self.window}, hop {self.hop}, margin {self.margin}"
            )
        if self.filters.dim() != 2 or len(self.filters) != self.window // 2 + 1:
            raise ValueError(f"filters must have {self.window // 2 + 1} rows, got shape {list(self.filters.shape)}")
        if min(self.frames, self.stride, self.smoothing) < 1 or self.longest < 2:
            raise ValueError("frames, stride and smoothing must be at least 1, longest at least 2")

    @property
    def windows(self) -> int:
        """Return the number of clips that overlap."""
        return -(-self.frames // self.stride)


@dataclass(frozen=True)
class SpotterSizes:
    """The sizes of a spotter with its network, in bytes on a 32-bit processor, without instructions.

    Attributes:
        network: the sizes of the classifier's program.
        tables: the front end's tables. state: the spotter's state, the states of the network included.
        stack: as in `Sizes`. operations: multiply-adds a second, those of the front end included.
        front_end: multiply-adds a second of the front end.
    """

    network: Sizes
    tables: int
    state: int
    stack: int
    operations: int
    front_end: int

    @property
    def flash(self) -> int:
        """Return the bytes of weights and tables."""
        return self.network.flash + self.tables

    def __str__(self) -> str:
        return (
            f"keyword spotter: flash {self.flash:,} bytes ({self.network.flash:,} of the network, {self.tables:,} of "
            f"the front end) and the code; RAM: {self.state:,} bytes of state, {stack_text(self.stack)}; "
            f"{self.operations:,} multiply-adds a second ({self.front_end:,} of the front end)"
        )


class SpotterProgram:
    """The files of a spotter's C program, beside those of the classifier."""

    def __init__(self, spotter: KeywordSpotter, network: Program) -> None:
        rnn, bands = network.rnn, spotter.filters.shape[1]
        if rnn.bidirectional:
            raise ValueError("a bidirectional network needs the end of the sound before it can start: no spotter")
        if rnn.input_size != bands:
            raise ValueError(f"the spotter has {bands} bands, but the network has {rnn.input_size} inputs")
        self.spotter, self.network = spotter, network
        self.filters = spotter.filters.cpu().numpy().astype(np.float32)
        self.radices = prime_factors(spotter.window // 2)
        self.ranges = [_range(column) for column in self.filters.T]
        self.named = {"name": network.name, "guard": network.name.upper()}
        self.numbers = {
            name: getattr(spotter, name)
            for name in ("window", "hop", "margin", "frames", "stride", "windows", "smoothing", "longest", "rate")
        } | {"bands": bands, "threshold": constant(spotter.threshold), "chunk": spotter.hop * spotter.stride}

    def header(self) -> str:
        title = comment(self.network.title)
        return template.HEADER.substitute(self.named | self.numbers, title=title, state_bytes=f"{self.sizes().state:,}")

    def source(self) -> str:
        outputs, ignored = self.network.outputs, self.spotter.ignored
        ignore = np.array([name in ignored for name in outputs], np.int8)
        data = "".join(
            array(name, kind, values) for name, kind, values in [*self._tables(), ("is_ignored", "int8_t", ignore)]
        )
        return template.SOURCE.substitute(
            self.named | self.numbers,
            words="\n".join(f"    {string(name)}," for name in outputs),
            data=data,
            floor=constant(self.spotter.floor),
            quiet=constant(self.spotter.quiet),
        )

    def demo(self) -> str:
        return demo_template.DEMO.substitute(self.named)

    def _tables(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield name, type and values of the front end's arrays."""
        angles = 2 * np.pi * np.arange(self.spotter.window) / self.spotter.window
        yield "cosine", "float", np.cos(angles).astype(np.float32)
        yield "radices", "uint8_t", np.array(self.radices, np.uint8)
        yield "mel_first", "uint16_t", np.array([first for first, _ in self.ranges], np.uint16)
        yield "mel_count", "uint16_t", np.array([count for _, count in self.ranges], np.uint16)
        parts = [
            column[first : first + count] for column, (first, count) in zip(self.filters.T, self.ranges, strict=True)
        ]
        yield "mel_weights", "float", np.concatenate(parts)

    def sizes(self) -> SpotterSizes:
        network, spotter, outputs = self.network.sizes(), self.spotter, len(self.network.outputs)
        front_end = (
            2 * spotter.window  # the Hann window and the power
            + 2 * spotter.window * sum(self.radices)  # a complex product is four
            + 4 * (spotter.window // 2 + 1)
            + sum(count for _, count in self.ranges)
        )
        step, scores = self.network.products()
        frames = spotter.rate / spotter.hop
        arrays = 2 * spotter.window + self.filters.shape[1] + spotter.smoothing * outputs
        return SpotterSizes(
            network=network,
            tables=sum(values.nbytes for _, _, values in self._tables()) + outputs * (POINTER + 1),
            state=2 * spotter.window + 4 * (arrays + 10) + spotter.windows * network.state,
            stack=network.stack,
            operations=round(frames * (front_end + spotter.windows * step + scores / spotter.stride)),
            front_end=round(frames * front_end),
        )


def prime_factors(number: int) -> list[int]:
    """Return the prime factors of `number`, the largest first."""
    factors = []
    for factor in range(2, number + 1):
        while number % factor == 0:
            factors.append(factor)
            number //= factor
    return factors[::-1]


def _range(column: np.ndarray) -> tuple[int, int]:
    """Return the first row that is not zero, and the number of rows up to the last one."""
    rows = np.flatnonzero(column)
    return (int(rows[0]), int(rows[-1] - rows[0] + 1)) if len(rows) else (0, 0)
