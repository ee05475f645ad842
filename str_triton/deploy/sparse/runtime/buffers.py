"""The memory of the images between layers: which images share a frame, where each is stored, when memory is reused."""

import math
from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from str_triton.deploy.sparse.runtime.layout import GRAIN, Frame, Window, plane_sizes
from str_triton.deploy.sparse.runtime.limits import check_memory
from str_triton.deploy.sparse.runtime.structs import View

FLOAT = 4


class Key(NamedTuple):
    """A value in padded form: its name and its phases.

    Attributes:
        turned: the value [..., features] is stored as one image of one row: features are channels, rows are pixels.
        bordered: the border around the pixels is minus infinity, not zeros; only copies write such an image.
        fill: for codes, the code in the border around the pixels.
    """

    value: str
    phases: tuple[int, int]
    turned: bool = False
    bordered: bool = False
    fill: int = 0


@dataclass
class _Place:
    """Memory that images of one frame, size and phases use in turn, so that their zeros lie in the same places."""

    floats: int
    begin: int = 0
    border: float = 0.0
    size: int = FLOAT  # bytes of an element


@dataclass
class Buffers:
    """Images by key, each [images, C, H, W] with shapes that follow from `shapes`.

    First connect and widen everything, then take and release in the order of use, then allocate.

    Attributes:
        group: how many images of a batch are in memory at once; None: all.
        whole: the keys whose images are all in memory, whatever `group` is.
        codes: the values whose elements are bytes.
    """

    shapes: dict[str, tuple[int, ...]]
    group: int | None = None
    whole: set[Key] = field(default_factory=set)
    codes: Container[str] = ()
    _groups: dict[Key, Key] = field(default_factory=dict)
    _frames: dict[Key, Frame] = field(default_factory=dict)
    _places: dict[Key, _Place] = field(default_factory=dict)
    _free: dict[tuple, list[_Place]] = field(default_factory=dict)
    _all: list[_Place] = field(default_factory=list)
    _memory: np.ndarray | None = None

    def size(self, value: str) -> int:
        """Return how many bytes an element of a value takes."""
        return 1 if value in self.codes else FLOAT

    def images(self, key: Key) -> int:
        """Return how many images of a value are in memory at once."""
        return self.shape(key)[0] if key in self.whole else self.at_once(key)

    def at_once(self, key: Key) -> int:
        """Return how many images of a value one operation reads or writes."""
        return self.shape(key)[0] if self.group is None or key.turned else self.group

    def shape(self, key: Key) -> tuple[int, int, int, int]:
        """Return the shape [images, C, H, W] of a value in this form."""
        shape = self.shapes[key.value]
        return (1, shape[-1], 1, math.prod(shape[:-1])) if key.turned else shape

    def root(self, key: Key) -> Key:
        """Return the key that represents all keys with the same frame."""
        root = key
        while self._groups.setdefault(root, root) != root:
            root = self._groups[root]
        self._groups[key] = root
        return root

    def frame(self, key: Key) -> Frame:
        return self._frames.setdefault(self.root(key), Frame())

    def connect(self, window: Window, x: Key, y: Key, residual: Key | None) -> None:
        """Give the images that a window reads and writes the same frame."""
        for other in filter(None, (x, residual)):
            self._groups[self.root(other)] = self.root(y)

    def fit(self, key: Key) -> None:
        """Make room for an image, once all are connected."""
        frame, sizes = self.frame(key), plane_sizes(self.shape(key)[2:], key.phases)
        frame.rows = max(frame.rows, *(rows for rows, _ in sizes))
        frame.columns = max(frame.columns, *(columns for _, columns in sizes))

    def widen(self, window: Window, x: Key, y: Key) -> None:
        """Make room for what a window reads around x."""
        window.widen(self.frame(y), self.shape(x)[2:], self.shape(y)[2:])

    def take(self, key: Key) -> None:
        """Find a place for an image that is written next."""
        if key in self._places:
            return
        elements = self.images(key) * self.shape(key)[1] * self.frame(key).channel(math.prod(key.phases))
        size = self.size(key.value)
        floats = -(-elements * size // (FLOAT * GRAIN)) * GRAIN
        # The groups of a batch use one place in turn, so a value that keeps all its images cannot share it.
        free = [] if key in self.whole else self._free.get(self._layout(key), [])
        # Take the smallest place that is large enough, or else enlarge the largest one.
        fitting = [place for place in free if place.floats >= floats]
        place = min(fitting, key=lambda p: p.floats) if fitting else max(free, key=lambda p: p.floats, default=None)
        if place is None:
            place = _Place(floats, border=-math.inf if key.bordered else key.fill, size=size)
            self._all.append(place)
        else:
            free.remove(place)
        place.floats = max(place.floats, floats)
        self._places[key] = place

    def release(self, key: Key) -> None:
        """Free the place of an image that is not read any more."""
        if key not in self.whole:
            self._free.setdefault(self._layout(key), []).append(self._places[key])

    def _layout(self, key: Key) -> tuple:
        """Return what fixes where an image's zeros are. A smaller image would read what a larger one left around it."""
        return self.root(key), key.phases, self.shape(key)[2:], key.bordered, key.fill, self.size(key.value)

    def allocate(self) -> None:
        """Allocate the memory, filled with zeros, with room on both sides for strips that read beyond their image.

        Raises TooLarge for memory beyond reason: a padding may be far larger than its image.
        """
        slack = max((2 * frame.plane for frame in self._frames.values()), default=0) + 1024
        total = slack
        for place in self._all:
            place.begin = total
            total += place.floats
        values = sum(math.prod(self.shapes[key.value]) for key in self._places)
        check_memory("the padded images", FLOAT * (total + slack), FLOAT * values)
        memory = np.zeros(total + slack + 16, np.float32)
        misaligned = memory.ctypes.data % 64 // FLOAT
        self._memory = memory[(16 - misaligned) % 16 :]
        for place in self._all:
            if place.border:
                part = self._memory[place.begin : place.begin + place.floats]
                part.view(np.uint8 if place.size == 1 else np.float32)[:] = place.border

    def view(self, key: Key, plane: int = 0, skipped: int = 0) -> View:
        """Return pointer and strides of an image, from the first pixel of a plane and the channel after `skipped`."""
        frame, channel = self.frame(key), self.frame(key).channel(math.prod(key.phases))
        elements = skipped * channel + plane * frame.plane + frame.origin
        return View(
            data=self._memory.ctypes.data + FLOAT * self._places[key].begin + self.size(key.value) * elements,
            image=self.shape(key)[1] * channel,
            channel=channel,
            plane=frame.plane,
            row=frame.pitch,
            column=1,
        )
