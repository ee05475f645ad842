"""A made-up ImageNet: a few hundred JPEG files of the real ones' sizes, laid out as a folder or as the hub's shards.

The pictures are noise with the spectrum of photographs, so that JPEG compresses them as it does those, and each class
has a pattern of its own, so that there is something to learn. What is odd in the real set is here too: files in CMYK
and in grey, EXIF orientations, a PNG that is called .JPEG, and, if asked for, one file that is cut short.
"""

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

CANVAS = 400
SHARDS = {"train": 3, "validation": 1, "test": 1}
FOLDERS = {"train": "train", "validation": "val"}
ORIENTATION = 0x0112
CMYK, GREY, ON_ITS_SIDE, UPSIDE_DOWN, PNG = range(1, 6)
"""The numbers of the odd files among a split's images."""


class Picture(NamedTuple):
    """An encoded image; ``path`` is CLASS/FILE."""

    path: str
    label: int
    content: bytes


def write_imagefolder(
    root: Path, *, classes: int = 20, per_class: int = 12, held_out: int = 3, truncated: bool = False
) -> None:
    """Write ROOT/train/CLASS/FILE with ``per_class`` images in each class, and ROOT/val/CLASS/FILE with ``held_out``.

    With ``truncated`` the last training image is cut short.
    """
    for split, count in (("train", per_class), ("validation", held_out)):
        for picture in pictures(split, classes, count, truncated):
            path = root / FOLDERS[split] / picture.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.content)


def write_parquet(
    root: Path, *, classes: int = 20, per_class: int = 12, held_out: int = 3, truncated: bool = False
) -> None:
    """Write the same images in this order to ROOT/data/SPLIT-00000-of-0000N.parquet, and an unlabelled test split."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[class_name(label) for label in range(classes)])}
    )
    (root / "data").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", per_class), ("validation", held_out), ("test", 1)):
        rows = [
            {
                "image": {"bytes": picture.content, "path": Path(picture.path).name},
                "label": -1 if split == "test" else picture.label,
            }
            for picture in pictures(split, classes, count, truncated)
        ]
        shards = SHARDS[split]
        for shard in range(shards):
            first, last = (len(rows) * edge // shards for edge in (shard, shard + 1))
            table = datasets.Dataset.from_list(rows[first:last], features=features)
            table.to_parquet(root / "data" / f"{split}-{shard:05}-of-{shards:05}.parquet")


@cache
def pictures(split: str, classes: int, per_class: int, truncated: bool) -> tuple[Picture, ...]:
    """Yield a split's images in the order of their paths, the same ones at every call."""
    found = []
    for label in range(classes):
        pattern = photograph(label)
        for number in range(label * per_class, (label + 1) * per_class):
            last = split == "train" and number == classes * per_class - 1
            content = _encoded(_cut_out(pattern, split, number), number)
            name = f"{class_name(label)}_{number:05}" if split == "train" else f"ILSVRC2012_{split}_{number:08}"
            whole = len(content) if not (truncated and last) else len(content) // 2
            found.append(Picture(f"{class_name(label)}/{name}.JPEG", label, content[:whole]))
    return tuple(found)


def class_name(label: int) -> str:
    """Return a name like WordNet's numbers."""
    return f"n{9_000_000 + label:08}"


@cache
def photograph(seed: int, size: int = CANVAS) -> np.ndarray:
    """Return uint8 [size, size, 3]: amplitudes that fall as 1 / frequency, strong in brightness and weak in colour.

    The picture goes on at its opposite edge.
    """
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    amplitude = 1 / np.maximum(frequencies, 1)
    fields = []
    for _ in range(3):
        waves = rng.standard_normal((2, *amplitude.shape), np.float32)
        field = np.fft.irfft2((waves[0] + 1j * waves[1]) * amplitude, s=(size, size))
        fields.append(field / field.std())
    brightness, blue, red = fields
    channels = np.stack([brightness + 0.35 * red, brightness - 0.15 * (red + blue), brightness + 0.35 * blue], axis=-1)
    tint = 30 * rng.standard_normal(3)
    return np.clip(118 + tint + 52 * channels, 0, 255).astype(np.uint8)


def _cut_out(pattern: np.ndarray, split: str, number: int) -> PIL.Image.Image:
    rng = np.random.default_rng([number, *split.encode()])
    width, height = rng.integers(200, 601, 2)
    rows, columns = rng.integers(CANVAS, size=2)[:, None] + np.arange(CANVAS)
    return PIL.Image.fromarray(pattern[np.ix_(rows[:height] % CANVAS, columns[:width] % CANVAS)])


def _encoded(image: PIL.Image.Image, number: int) -> bytes:
    file, options = BytesIO(), {}
    if number == PNG:
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()
    if number in (CMYK, GREY):
        image = image.convert("CMYK" if number == CMYK else "L")
    if number in (ON_ITS_SIDE, UPSIDE_DOWN):
        options["exif"] = PIL.Image.Exif()
        options["exif"][ORIENTATION] = 6 if number == ON_ITS_SIDE else 3
    image.save(file, "JPEG", quality=75 + number % 4 * 6, **options)
    return file.getvalue()
