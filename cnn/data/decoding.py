"""From an encoded image (JPEG, PNG, ...) to the pixels of a part of it, upright and scaled: Pillow decodes.

The decoder should take most of the time. So only the part that is asked for is copied out of Pillow's image, PyTorch
scales it (its bilinear filter for uint8 is Pillow's, within one level, in a fraction of the time), and EXIF data are
read only where there are any.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels"""
TEST_SHARE_OF_SIDE = 224 / 256
TRIES = 10
CROP_DRAWS = 2 + 2 * TRIES
AREAS, ASPECTS = (0.08, 1.0), (3 / 4, 4 / 3)
EXIF_ORIENTATION = 0x0112
DRAFTED = ("JPEG", "MPO")
"""The formats that Pillow can decode at a fraction of their size."""
EXIF_PLACES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where Pillow finds an orientation, in an image's info."""

# Pillow logs what it stumbles over, and Python prints what nobody handles; the exception that follows is enough.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextmanager
def opened(name: str, content: str | bytes) -> "Iterator[Image]":
    """Open an image, to be decoded later. Raises ValueError with `name`, in one line, for whatever goes wrong inside.

    What Pillow warns of (damaged EXIF data, odd tags, an unusual size) is no reason to do without the pixels. Images
    of more than 179 megapixels, which may be small files, are an error.
    """
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
                yield image
    except Exception as error:  # damaged files make Pillow's decoders raise nearly everything, SyntaxError too
        raise ValueError(f"{name}: not a readable image ({_cause(error)}); replace or remove it") from error


def _cause(error: Exception) -> str:
    import PIL

    if isinstance(error, PIL.UnidentifiedImageError):  # its own text names the buffer in memory
        return "of no known format"
    return (str(error).splitlines() or [type(error).__name__])[0]


def upright_size(image: "Image") -> tuple[int, int]:
    """Return (width, height) as a viewer shows it; orientations 5 to 8 of a camera lie on the side."""
    return image.size[::-1] if _orientation(image) >= 5 else image.size


def decode(
    name: str, content: str | bytes, size: tuple[int, int], choose: Callable[[int, int], Box], *, mirror: bool = False
) -> np.ndarray:
    """Decode an image, turn it upright, and scale the box that `choose(width, height)` names to `size` (height, width).

    Returns uint8 [height, width, 3], mirrored if asked for. Grey (of 1 to 16 bits), palette and CMYK images become RGB,
    alpha is dropped, and of several frames or pages the first is taken. A JPEG that is at least twice as large as
    needed is decoded at a half, a quarter or an eighth of its size. Raises ValueError with `name` if the image cannot
    be decoded, or if its pixels have no known range (32 bits, floating point).
    """
    import PIL.Image

    height, width = size
    with opened(name, content) as image:
        if image.format not in DRAFTED:
            image.load()  # a PNG may say its orientation after its pixels
        orientation, (full_width, full_height) = _orientation(image), upright_size(image)
        left, top, right, bottom = choose(full_width, full_height)
        scale = min((right - left) / width, (bottom - top) / height)
        if scale > 1:
            image.draft(None, (math.ceil(image.size[0] / scale), math.ceil(image.size[1] / scale)))
        upright = _turned(_to_rgb(image), orientation)
        across, down = upright.size[0] / full_width, upright.size[1] / full_height
        box = round(left * across), round(top * down), round(right * across), round(bottom * down)
        part = upright.crop(box)
        if mirror:
            part = part.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(part))[None].permute(0, 3, 1, 2)
        return F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def _orientation(image: "Image") -> int:
    """Return the orientation, 1 to 8, by EXIF data or XMP; 1 where they are damaged, as viewers do."""
    if image.format == "TIFF":  # Pillow turns it upright itself, and gives its size as that of the upright image
        return 1
    if not any(place in image.info for place in EXIF_PLACES):
        return 1
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as in `opened`
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turned(image: "Image", orientation: int) -> "Image":
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image: "Image") -> "Image":
    import PIL.Image

    # PPM's mode I holds 0 to 65535, whatever the file's own maximum.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip it at 255
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}, have no known range")
    if image.mode == "P" and "transparency" in image.info:  # as Pillow demands; alpha is dropped
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def whole(width: int, height: int) -> Box:
    """All of the image."""
    return 0, 0, width, height


def centre(width: int, height: int) -> Box:
    """The square in the middle that is left of resizing to 256 and cropping 224, to the nearest pixel."""
    side = max(1, round(TEST_SHARE_OF_SIDE * min(width, height)))
    return _middle(width, height, side, side)


def random_crop(width: int, height: int, draws: Sequence[float]) -> Box:
    """8 % to 100 % of the area at an aspect from 3:4 to 4:3, anywhere: what torchvision's RandomResizedCrop draws.

    As there, areas are uniform and aspects uniform in their logarithm; what sticks out of the image is drawn again, ten
    times at most, and then the largest box in the middle whose aspect is within the range is taken.

    draws: CROP_DRAWS numbers in [0, 1): the position across and down, then an area and an aspect for each try.
    """
    across, down, *tries = draws
    for area, aspect in zip(tries[::2], tries[1::2], strict=True):
        area = (AREAS[0] + (AREAS[1] - AREAS[0]) * area) * width * height
        aspect = ASPECTS[0] * (ASPECTS[1] / ASPECTS[0]) ** aspect
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(across * (width - crop_width + 1)), int(down * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * ASPECTS[1])))
    crop_height = min(height, max(1, round(width / ASPECTS[0])))
    return _middle(width, height, crop_width, crop_height)


def _middle(width: int, height: int, crop_width: int, crop_height: int) -> Box:
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
