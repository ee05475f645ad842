"""interface.json: the information needed to feed a trained network and to read its outputs."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unicodedata import normalize

from str_triton.files import percent

INTERFACE = "interface.json"
RESIZE = "bilinear, antialiased"  # the way in which every network of the programs has its images scaled
LONGEST = 2**12  # the largest height and width of images to believe; a network would compute for minutes on one image
ENTRIES = ("outputs", "standardisation", "images")
TOLERANCE = 1e-2  # differences of means and deviations to ignore, in deviations: rounding, and images left out


@dataclass(frozen=True)
class ImageInput:
    """The images that a network takes.

    Attributes:
        channels: 3 for RGB, 1 for grey.
        height, width: the size in pixels.
        crop: the central square to cut out of an image before scaling, as a share of the image's shorter side; None:
            the whole image is scaled. Images are scaled as `RESIZE` says.
    """

    channels: int
    height: int
    width: int
    crop: float | None

    def part(self) -> str:
        """Return in words which part of an image is scaled."""
        if self.crop is None:
            return "the whole image"
        return f"the central square of {percent(self.crop)} of the shorter side"

    def __str__(self) -> str:
        return f"{self.channels} x {self.height} x {self.width}, of {self.part()}"


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a network.

    Attributes:
        outputs: the meaning of the scores: the class names, or the characters of a language model.
        standardisation: mean and deviation of each feature or colour channel; the network's input is (x - mean) / std.
            Pixels are 0 to 255. None: no standardisation.
        images: the images that the network takes; None for a network that does not take images.
    """

    outputs: tuple[str, ...]
    standardisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    images: ImageInput | None = None

    def record(self) -> dict[str, Any]:
        """Return the interface as plain values for JSON. `Interface.of` reads them."""
        numbers = self.standardisation and dict(zip(("mean", "std"), map(list, self.standardisation), strict=True))
        record = {"outputs": list(self.outputs), "standardisation": numbers}
        return record | ({} if self.images is None else {"images": {**vars(self.images), "resize": RESIZE}})

    def text(self) -> str:
        """Return the content of interface.json."""
        return json.dumps(self.record()) + "\n"

    def texts(self) -> dict[str, str]:
        """Return the entries of `record`, each as JSON, for files whose metadata are texts: safetensors and ONNX."""
        return {name: json.dumps(value) for name, value in self.record().items()}

    def change(self, now: "Interface") -> str | None:
        """Return in words the first difference of ``now`` from this interface; None if a network can go on with it.

        Differences of accents, which file systems write in two ways, and those that `standardisation_change`
        ignores do not count.
        """
        for number, (old, new) in enumerate(zip_longest(self.outputs, now.outputs)):
            if not same_name(old, new):
                return f"output {number} was {_or_missing(old)}, and is {_or_missing(new)} now"
        if (change := self.standardisation_change(now)) is not None:
            return change
        if self.images != now.images:
            return f"the images were {self.images}, and are {now.images} now"
        return None

    def standardisation_change(self, now: "Interface") -> str | None:
        """Return in words the first difference of the standardisation; None if there is none above `TOLERANCE`."""
        for number, (old, new) in enumerate(zip_longest(self._features(), now._features())):
            if not _is_close(old, new):
                old, new = _or_missing(old), _or_missing(new)
                return f"the mean and deviation of feature {number} were {old}, and are {new} now"
        return None

    def _features(self) -> list[tuple[float, float]]:
        """Return the mean and deviation of each feature."""
        return [] if self.standardisation is None else list(zip(*self.standardisation, strict=True))

    @classmethod
    def read(cls, path: Path) -> "Interface":
        """Read interface.json; raise ValueError, which names the file, if it is damaged, and OSError."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (RecursionError, ValueError):
            raise ValueError(f"{path}: it is empty, cut short or no JSON: restore it, or name a whole one") from None
        try:
            return cls.of(record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def in_metadata(cls, metadata: Mapping[str, Any], path: object) -> "Interface | None":
        """Return the interface in a file's metadata, plain or as `texts`; None if there is none.

        Raises ValueError, which names ``path``, if it is damaged.
        """
        if "outputs" not in metadata:
            return None
        entries = {name: metadata[name] for name in ENTRIES if name in metadata}
        try:
            if isinstance(entries["outputs"], str):
                entries = {name: json.loads(text) for name, text in entries.items()}
            return cls.of(entries)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def of(cls, record: Any) -> "Interface":
        """Read plain values; raise ValueError, in words that follow a file's name, for anything else."""
        if not isinstance(record, Mapping) or not {"outputs", "standardisation"} <= record.keys():
            raise ValueError("it does not describe a network: it needs the entries 'outputs' and 'standardisation'")
        outputs = record["outputs"]
        if not isinstance(outputs, list) or not outputs or not all(isinstance(name, str) for name in outputs):
            raise ValueError("the names of its scores are not strings")
        if doubled := [name for name, number in Counter(outputs).items() if number > 1]:
            raise ValueError(f"two of its scores have the name {doubled[0]!r}")
        numbers, images = record["standardisation"], record.get("images")
        standardisation = None if numbers is None else _standardisation(numbers)
        taken = None if images is None else _image_input(images)
        if taken is not None and standardisation is not None and len(standardisation[0]) != taken.channels:
            raise ValueError(f"its images have {taken.channels} colour channels, but {len(standardisation[0])} means")
        return cls(tuple(outputs), standardisation, taken)


def same_name(one: str | None, other: str | None) -> bool:
    """Return whether two names are equal, whichever way their accents are written."""
    return one == other or (None not in (one, other) and normalize("NFC", str(one)) == normalize("NFC", str(other)))


def _or_missing(value: str | tuple[float, float] | None) -> str:
    if value is None:
        return "missing"
    return repr(value) if isinstance(value, str) else "{:.6g} and {:.6g}".format(*value)


def _is_close(old: tuple[float, float] | None, new: tuple[float, float] | None) -> bool:
    """Return whether the mean and deviation of a feature differ only by rounding."""
    if old is None or new is None:
        return False
    near = TOLERANCE * old[1]
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=near) for a, b in zip(old, new, strict=True))


def _standardisation(numbers: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not isinstance(numbers, Mapping) or not {"mean", "std"} <= numbers.keys():
        raise ValueError("its standardisation has no mean or no std")
    mean, std = numbers["mean"], numbers["std"]
    if not isinstance(mean, list) or not isinstance(std, list):
        raise ValueError("its means and deviations are not lists of numbers")
    for name, values in (("means", mean), ("deviations", std)):
        good = all(
            isinstance(value, int | float) and math.isfinite(value) and (value > 0 or values is mean)
            for value in values
        )
        if not good or len(values) != len(mean):
            raise ValueError(f"its {name} are not {len(mean)} numbers that can standardise inputs")
    return tuple(mean), tuple(std)


def _image_input(record: Any) -> ImageInput:
    fields = ("channels", "height", "width")
    if not isinstance(record, Mapping) or not all(type(record.get(name)) is int for name in fields):
        raise ValueError("its images have no channels, height and width")
    channels, height, width = (record[name] for name in fields)
    crop = record.get("crop")
    if channels not in (1, 3) or not (0 < height <= LONGEST and 0 < width <= LONGEST):
        raise ValueError(
            f"its images are {channels} x {height} x {width}: channels must be 1 or 3, height and width 1 to {LONGEST}"
        )
    if crop is not None and not (isinstance(crop, int | float) and 0 < crop <= 1):
        raise ValueError(f"its images are cropped to {crop!r}, which is not a share above 0 and up to 1")
    if record.get("resize", RESIZE) != RESIZE:
        raise ValueError(f"its images are resized by {record['resize']!r}, but this program does it by {RESIZE!r}")
    return ImageInput(channels, height, width, crop)
