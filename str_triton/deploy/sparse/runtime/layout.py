"""Memory layout of pixels: images with padded rows, split into phases for strided readers, and taps as flat offsets.

A value of shape [images, channels, height, width] in the phases (sy, sx) is stored as sy * sx planes per channel. Pixel
(y, x) is in plane (y % sy) * sx + x % sx at row y // sy, column x // sx. Images that a convolution or a sum connects
share a frame: one pitch and one size of planes, so that output and input pixels have the same flat index.
"""

import math
from dataclasses import dataclass

import numpy as np

from str_triton.deploy.sparse.runtime.limits import TooLarge

GRAIN = 16  # floats in a cache line, as in copies.h: planes begin at whole lines, and lengths are multiples of it


@dataclass
class Frame:
    """The layout that the images of a connected group share.

    Attributes:
        columns: the widest plane's; gap: zeros between two rows; rows, above, below: rows of pixels and of zeros.
    """

    columns: int = 1
    gap: int = 0
    rows: int = 1
    above: int = 0
    below: int = 0

    @property
    def pitch(self) -> int:
        return self.columns + self.gap

    @property
    def origin(self) -> int:
        """Floats of a plane before its first pixel."""
        return _up(self.above * self.pitch + self.gap)

    @property
    def plane(self) -> int:
        return self.origin + _up((self.rows + self.below) * self.pitch + self.gap)

    def length(self, rows: int) -> int:
        """Return the floats from the first pixel of a plane to the end of its last row, in whole grains."""
        return _up(rows * self.pitch)

    def channel(self, planes: int) -> int:
        """Return the floats of a channel: an odd number of lines, since powers of two would use few sets of a cache."""
        return (planes * self.plane // GRAIN | 1) * GRAIN


def _up(floats: int) -> int:
    return -(-floats // GRAIN) * GRAIN


def plane_sizes(size: tuple[int, int], phases: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the rows and columns of each plane."""
    return [
        (len(range(p, size[0], phases[0])), len(range(q, size[1], phases[1])))
        for p in range(phases[0])
        for q in range(phases[1])
    ]


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or pool, and the phases of its output.

    Its input has stride * phases phases, so that every tap is a plain offset.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    phases: tuple[int, int]

    @property
    def reads(self) -> tuple[int, int]:
        return self.stride[0] * self.phases[0], self.stride[1] * self.phases[1]

    @property
    def tables(self) -> int:
        """The number of sets of offsets: one for all planes if each output plane reads only its own input plane."""
        return 1 if self.kernel == (1, 1) == self.stride and self.padding == (0, 0) else math.prod(self.phases)

    def shifts(self, axis: int, phase: int) -> list[tuple[int, int]]:
        """Return the phase that each element of the kernel along an axis reads, and the shift in rows or columns."""
        starts = (
            k * self.dilation[axis] - self.padding[axis] + self.stride[axis] * phase for k in range(self.kernel[axis])
        )
        return [(start % self.reads[axis], start // self.reads[axis]) for start in starts]

    def widen(self, frame: Frame, source: tuple[int, int], target: tuple[int, int]) -> bool:
        """Give `frame` the zeros that this window reads around an image of size `source`; return whether it reads any.

        `target` is the size of the output.
        """
        margins = []
        for axis in (0, 1):
            before = after = 0
            for phase in range(self.phases[axis]):
                wanted = len(range(phase, target[axis], self.phases[axis]))
                for read, shift in self.shifts(axis, phase) if wanted else ():
                    before = max(before, -shift)
                    present = len(range(read, source[axis], self.reads[axis]))
                    after = max(after, wanted + shift - present)
            margins.append((before, after))
        (above, below), (left, right) = margins
        frame.above, frame.below = max(frame.above, above), max(frame.below, below)
        frame.gap = max(frame.gap, left, right)
        return any((above, below, left, right))


PLAIN = (1, 1)
PIXEL = Window(PLAIN, PLAIN, (0, 0), PLAIN, PLAIN)  # an output pixel reads the pixel in its place


def offsets(window: Window, frame: Frame, plane: int, channels: int) -> np.ndarray:
    """Return the offsets in floats, [channels, kernel height, kernel width], at which one output plane reads."""
    rows, columns = window.shifts(0, plane // window.phases[1]), window.shifts(1, plane % window.phases[1])
    row_phase, row_shift = (np.array(numbers, np.int64)[:, None] for numbers in zip(*rows, strict=True))
    column_phase, column_shift = (np.array(numbers, np.int64) for numbers in zip(*columns, strict=True))
    places = (row_phase * window.reads[1] + column_phase) * frame.plane + row_shift * frame.pitch + column_shift
    result = np.arange(channels)[:, None, None] * frame.channel(math.prod(window.reads)) + places
    if result.size and np.abs(result).max() >= 2**31:
        raise TooLarge(f"an image of {int(np.abs(result).max()):,} floats is too large for 32-bit offsets")
    return result.astype(np.int32)


def mask(frame: Frame, size: tuple[int, int], phases: tuple[int, int], length: int) -> np.ndarray:
    """Return [planes, length] int32: -1 where a pixel lies, 0 in the padding."""
    result = np.zeros((math.prod(phases), length), np.int32)
    for plane, (rows, columns) in zip(result, plane_sizes(size, phases), strict=True):
        body = plane[: rows * frame.pitch].reshape(rows, frame.pitch)
        body[:, :columns] = -1
    return result
