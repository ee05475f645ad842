"""Decoding of images (JPEG, PNG, ...) with Pillow, and cropping, turning upright and scaling of the pixels.

Decoding should take most of the time, so the rest is kept cheap. Only the crop is copied out of Pillow's image. PyTorch
scales it: its bilinear filter for uint8 agrees with Pillow's within one level and is several times as fast. EXIF data
are parsed only where there are any.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
"""The keys of an image's info from which Pillow reads an orientation."""

# Python prints log messages that have no handler. Pillow logs errors in files, and also raises an exception for them.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextmanager
def opened(name: str, content: str | bytes) -> "Iterator[Image]":
    """Open an image without decoding it. Raise ValueError, one line with `name`, for any error in the block.

    Pillow's warnings (damaged EXIF data, odd tags, an unusual size) are ignored: the pixels are usable. Images of more
    than 179 megapixels, which may be small files, are an error.
    """
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
                yield image
    except Exception as error:  # for damaged files Pillow's decoders raise many types, SyntaxError among them
        raise ValueError(f"{name}: not a readable image ({_cause(error)}); replace or remove it") from error


def _cause(error: Exception) -> str:
    import PIL

    if isinstance(error, PIL.UnidentifiedImageError):  # its message shows the address of a buffer
        return "unknown format"
    return (str(error).splitlines() or [type(error).__name__])[0]


def upright_size(image: "Image") -> tuple[int, int]:
    """Return (width, height) of the image after turning it upright. Orientations 5 to 8 swap the two."""
    return image.size[::-1] if _orientation(image) >= 5 else image.size


def decode(
    name: str,
    content: str | bytes,
    size: tuple[int, int],
    choose: Callable[[int, int], Box],
    *,
    mirror: bool = False,
    channels: int = 3,
) -> np.ndarray:
    """Decode an image, turn it upright, crop it to `choose(width, height)`, and scale that to `size` (height, width).

    Returns uint8 [height, width, channels], mirrored with `mirror`. Grey (of 1 to 16 bits), palette and CMYK images
    become RGB. Of 16 bits the upper 8 are kept, whatever range the image uses. With one channel RGB becomes grey by
    Pillow's weights, and a grey image keeps its values. Alpha is dropped. The first of several frames or pages is
    taken. A JPEG at least twice as large as needed is decoded at a half, a quarter or an eighth of its size.

    Raises ValueError with `name` if the image cannot be decoded, or if the range of its pixels is unknown (32 bits,
    floating point).
    """
    import PIL.Image

    height, width = size
    with opened(name, content) as image:
        if image.format not in DRAFTED:
            image.load()  # a PNG may store its orientation after its pixels
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
        scaled = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        return scaled if channels == 3 else np.array(PIL.Image.fromarray(scaled).convert("L"))[:, :, None]


def _orientation(image: "Image") -> int:
    """Return the orientation, 1 to 8, from EXIF data or XMP. Return 1 where these are damaged, as viewers do."""
    if image.format == "TIFF":  # Pillow turns TIFF images upright itself, and reports their upright size
        return 1
    if not any(place in image.info for place in EXIF_PLACES):
        return 1
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged data raise many types, see `opened`
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

    # Pillow scales a PPM of mode I to 0 ... 65535, whatever the maximum in the file.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip it at 255
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of its 32-bit pixels (mode {image.mode}) is unknown")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns without it; alpha is dropped below
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def whole(width: int, height: int) -> Box:
    """Return the box of the whole image."""
    return 0, 0, width, height


def centre(width: int, height: int, share: float = TEST_SHARE_OF_SIDE) -> Box:
    """Return the central square whose side is a share of the shorter side, to the nearest pixel.

    The default is the square that resizing to 256 and cropping to 224 would keep.
    """
    side = max(1, round(share * min(width, height)))
    return _middle(width, height, side, side)


def crop_of(share: float | None) -> Callable[[int, int], Box]:
    """Return the choice of what to see of a test image: the central square of a share, or the whole image for None."""
    return whole if share is None else partial(centre, share=share)


def random_crop(width: int, height: int, draws: Sequence[float]) -> Box:
    """Return a random box with 8 % to 100 % of the area and an aspect ratio of 3:4 to 4:3.

    The distribution is that of torchvision's RandomResizedCrop: uniform areas, and aspect ratios uniform in their
    logarithm. A box that does not fit into the image is drawn again, at most ten times. After that the largest central
    box with an aspect ratio in the range is taken.

    Args:
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
