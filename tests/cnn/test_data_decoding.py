"""From an image to pixels: orientation, size, colours, and where random crops lie."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import PIL.features
import PIL.Image
import pytest
import torch

from str_triton.cnn.data.counter_random import uniforms
from str_triton.cnn.data.decoding import CROP_DRAWS, centre, decode, opened, random_crop, upright_size, whole

RED, GREEN, BLUE = (250, 10, 20), (10, 240, 30), (20, 30, 230)


def striped(size: tuple[int, int]) -> PIL.Image.Image:
    """Left quarter red; the rest green above, blue below, at a quarter of the height."""
    image = PIL.Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 4, 0, size[0], size[1] // 4))
    image.paste(BLUE, (size[0] // 4, size[1] // 4, size[0], size[1]))
    return image


def encode(image: PIL.Image.Image, form: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(32, 16), (640, 320)], ids=["whole", "draft"])
@pytest.mark.parametrize("box", [whole, centre, lambda width, height: (width / 2, 0, width, height)])
def test_a_camera_on_its_side_is_turned_upright(orientation: int, size: tuple[int, int], box: Callable):
    """An upright image, stored the way a camera in that orientation stores it, comes out as itself."""
    turn = PIL.Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    upright = striped(size)
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    content = encode(stored, "JPEG", quality=95, subsampling=0, exif=exif)
    expected = upright.resize((24, 12), PIL.Image.Resampling.BILINEAR, box=box(*size))
    pixels = decode("x", content, (12, 24), box)
    assert pixels.shape == (12, 24, 3)
    assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "PNG, notes last"])
def test_every_format_is_turned_once(form: str, orientation: int):
    turns = {
        2: np.fliplr,
        3: lambda v: np.rot90(v, 2),
        4: np.flipud,
        5: lambda v: v.transpose(1, 0, 2),
        6: lambda v: np.rot90(v, -1),
        7: lambda v: np.rot90(v, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    if form == "AVIF" and not PIL.features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    stored = np.asarray(striped((96, 80)))
    expected = turns.get(orientation, lambda v: v)(stored)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    content = encode(PIL.Image.fromarray(stored), form.partition(",")[0], exif=exif)
    if form == "PNG, notes last":
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        content = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    pixels = decode("x", content, expected.shape[:2], whole)
    assert np.abs(pixels.astype(int) - expected).mean() < 4
    if form != "PNG, notes last":
        with opened("x", content) as image:
            assert upright_size(image) == expected.shape[1::-1]


def test_a_jpeg_scaled_while_decoding_looks_like_one_scaled_after(monkeypatch: pytest.MonkeyPatch):
    sizes, crop = [], PIL.Image.Image.crop
    monkeypatch.setattr(PIL.Image.Image, "crop", lambda image, box: sizes.append(image.size) or crop(image, box))
    rng = np.random.default_rng(0)
    smooth = PIL.Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((1301, 903))
    content = encode(smooth, "JPEG", quality=95)
    for box in (whole(1301, 903), centre(1301, 903), (700, 13, 1290, 700)):
        expected = smooth.resize((224, 224), PIL.Image.Resampling.BILINEAR, box=box)
        pixels = decode("x", content, (224, 224), lambda width, height, box=box: box)
        assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 2
    assert sizes == [(326, 226), (651, 452), (651, 452)]  # a quarter, then half of the size


@pytest.mark.parametrize("mirror", [False, True])
def test_a_part_is_scaled_as_pillow_does(mirror: bool):
    """Up and down, mirrored or not: PyTorch's filter is Pillow's, within a level."""
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8))
    for box in ((20, 10, 60, 40), (0, 0, 200, 150), (3, 2, 4, 140)):
        expected = np.asarray(image.crop(box).resize((96, 64), PIL.Image.Resampling.BILINEAR))
        found = decode("x", encode(image, "PNG"), (64, 96), lambda width, height, box=box: box, mirror=mirror)
        assert np.abs(found.astype(int) - expected[:, :: -1 if mirror else 1]).max() <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("note", ["exif", "xmp"])
def test_damaged_notes_of_a_camera_are_passed_over(note: str):
    cut_short = b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03\0\0\0\x07"
    notes = {"exif": cut_short, "xmp": b'<x tiff:Orientation="9"/>'}
    image = striped((32, 16))
    content = encode(image, "JPEG", quality=95, subsampling=0, **{note: notes[note]})
    pixels = decode("x", content, (16, 32), whole)
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 4


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
        ("PA", "TIFF"),
        ("YCbCr", "TIFF"),
        ("LA", "TIFF"),
        ("1", "BMP"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(mode: str, form: str):
    image = striped((32, 16)).convert(mode)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    if mode == "P" and form == "PNG":
        options["transparency"] = bytes(range(256))
    pixels = decode("x", encode(image, form, **options), (16, 32), whole)
    assert np.abs(pixels.astype(int) - np.asarray(image.convert("RGB"))).max() <= (6 if form == "JPEG" else 0)


def test_grey_of_16_bits_keeps_its_range():
    values = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    pixels = decode("x", encode(PIL.Image.fromarray(values), "PNG"), (16, 16), whole)
    assert np.array_equal(pixels, np.repeat((values >> 8)[..., None], 3, axis=2))


def netpbm(kind: bytes, maxval: int, values: np.ndarray) -> bytes:
    """Return a file of grey (P2 or P5) or coloured (P3 or P6) pixels, each from 0 to `maxval`."""
    header = b"%s\n# a comment\n%d %d\n%d\n" % (kind, values.shape[1], values.shape[0], maxval)
    if kind in (b"P2", b"P3"):
        return header + " ".join(map(str, values.ravel().tolist())).encode()
    return header + values.astype(np.uint8 if maxval < 256 else ">u2").tobytes()


@pytest.mark.parametrize("maxval", [1, 15, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", [b"P2", b"P3", b"P5", b"P6"])
def test_every_maximum_of_pgm_and_ppm_is_white(kind: bytes, maxval: int):
    shares = np.linspace(0, 1, 80 * 96 * 3).reshape(80, 96, 3)[:, :, :: 1 if kind in (b"P3", b"P6") else 3]
    values = np.round(shares * maxval).astype(int)
    pixels = decode("x.pgm", netpbm(kind, maxval, values), (80, 96), whole)
    assert np.abs(pixels - values / maxval * 255).max() <= 1
    assert pixels.max() == 255


def test_the_first_frame_is_taken():
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        pixels = decode("x", encode(frames[0], form, save_all=True, append_images=frames[1:]), (16, 16), whole)
        assert np.abs(pixels.astype(int) - RED).max() < 16, form


PNG = encode(striped((32, 16)), "PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unknown format"),
        (b"text", "unknown format"),
        (PNG[:60], "truncated"),
        (b"P5\n0 16\n255\n", "unknown format"),
        (b"P5\n32 16\n65535\n" + bytes(100), ""),
        (b"P5\n32 16\n4095\n" + bytes(100), "not enough"),
        (b"P5\n32 16\n70000\n" + bytes(1024), "maxval"),
        (b"P5\n20000 20000\n255\n" + bytes(1024), "400000000 pixels"),
        (encode(PIL.Image.new("F", (8, 8)), "TIFF"), "range of its 32-bit pixels"),
        (encode(PIL.Image.new("I", (8, 8)), "TIFF"), "range of its 32-bit pixels"),
    ],
    ids=range(10),
)
def test_what_cannot_be_decoded_is_one_line_with_its_name(content: bytes, message: str):
    with pytest.raises(ValueError, match=r"^x: not a readable image \(.*\); replace or remove it$") as refusal:
        decode("x", content, (16, 32), whole)
    assert message in str(refusal.value)
    assert "0x" not in str(refusal.value)


@pytest.mark.filterwarnings("error")
def test_a_large_photograph_is_no_bomb(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 400)  # a warning above, an error above twice as many
    assert decode("x", PNG, (16, 32), whole).shape == (16, 32, 3)


def crop_by_torchvision(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a crop by torchvision's rule with numpy's random numbers: left, top, width, height."""
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * width * height
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    else:
        w, h = round(height * (4 / 3)), height
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(("width", "height"), [(500, 375), (200, 600), (320, 100), (30, 20)])
def test_random_crops_are_distributed_as_torchvisions(width: int, height: int):
    """Sides, place, area and aspect: the two samples' distribution functions differ by no more than chance allows."""
    count, rng = 4000, np.random.default_rng(0)
    draws = uniforms(0, 0, torch.arange(count), CROP_DRAWS)
    boxes = np.array([random_crop(width, height, own) for own in draws.T.tolist()])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (width, height)).all()
    ours = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    theirs = np.array([crop_by_torchvision(width, height, rng) for _ in range(count)])
    for first, second in zip(features(ours, width, height), features(theirs, width, height), strict=True):
        values = np.concatenate([first, second])
        shares = [np.searchsorted(np.sort(sample), values, side="right") / count for sample in (first, second)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * (2 / count) ** 0.5  # chance exceeds it once in a thousand


def features(crops: np.ndarray, width: int, height: int) -> list[np.ndarray]:
    left, top, w, h = crops.T.astype(float)
    return [left, top, w, h, w * h, w / h, left / (width - w + 1), top / (height - h + 1)]


def test_the_draws_of_a_crop_have_nothing_to_do_with_each_other():
    draws = uniforms(0, 0, torch.arange(4000), CROP_DRAWS)
    boxes = torch.tensor([random_crop(1000, 1000, own) for own in draws.T.tolist()], dtype=torch.float64)
    left, top, w, h = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    drawn = torch.stack([left / (1001 - w), top / (1001 - h), w * h, (w / h).log()])
    correlations = torch.corrcoef(drawn[:, w * h < 7e5]) - torch.eye(4)  # larger ones have less choice of an aspect
    assert correlations.abs().max() < 0.06


def test_what_no_try_fits_is_cut_in_the_middle():
    for width, height, box in ((1000, 30, (480, 0, 520, 30)), (30, 1000, (0, 480, 30, 520)), (1, 1, (0, 0, 1, 1))):
        assert random_crop(width, height, [0.9, 0.9] + [0.9, 0.5] * 10) == box
