"""IDX files: every name and form in which they are published, and one clear line for everything that can be wrong."""

import gzip
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from str_triton.cnn.data import load
from str_triton.cnn.data.idx import read_idx
from tests.messages import holding

SIZES = {"train": 40, "t10k": 20}


def encode(array: Tensor) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.numpy().tobytes()


def write(directory: Path, name: str, array: Tensor, compress: bool = False) -> None:
    content = encode(array.to(torch.uint8))
    (directory / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)


def images_of(part: str) -> Tensor:
    generator = torch.Generator().manual_seed(SIZES[part])
    return torch.randint(0, 256, (SIZES[part], 6, 5), dtype=torch.uint8, generator=generator)


def labels_of(part: str) -> Tensor:
    return torch.arange(SIZES[part]) % 10


def write_mnist(directory: Path, separator: str = "-", compress: bool = False) -> None:
    for part in SIZES:
        write(directory, f"{part}-images{separator}idx3-ubyte", images_of(part), compress)
        write(directory, f"{part}-labels{separator}idx1-ubyte", labels_of(part), compress)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("name", ["mnist", "kmnist", "fashion-mnist"])
def test_a_set_is_read_as_published(name: str, separator: str, compress: bool, tmp_path: Path):
    write_mnist(tmp_path, separator, compress)
    data = load(name, str(tmp_path))
    assert (data.num_classes, data.image_shape, data.name) == (10, (1, 6, 5), name)
    for images, part in ((data.train, "train"), (data.test, "t10k")):
        assert torch.equal(images.images[:, 0], images_of(part))
        assert torch.equal(images.labels, labels_of(part))
    assert data.train.augmentation.flip == (name == "fashion-mnist")
    every, _ = data.train.batch(torch.arange(40), seed=0, epoch=0, augment=False)
    every = data.train.normalisation(every)
    assert abs(every.mean()) < 1e-5
    assert abs(every.std(correction=0) - 1) < 1e-5
    mean, std = images_of("train").double().mean(), images_of("train").double().std(correction=0)
    test, _ = data.test.batch(torch.arange(20), seed=0, epoch=0, augment=False)
    assert torch.allclose(data.test.normalisation(test)[:, 0].double(), (images_of("t10k") - mean) / std, atol=1e-5)


def test_a_name_ending_in_gz_may_lie(tmp_path: Path):
    """Browsers and unpackers rename or unpack on the way: the content decides."""
    write_mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name + ".gz"))
    assert len(load("mnist", str(tmp_path)).train) == 40


def write_emnist(directory: Path, split: str, first_label: int, num_classes: int) -> None:
    for part, images in (("train", images_of("train")), ("test", images_of("t10k"))):
        labels = first_label + torch.arange(len(images)) % num_classes
        write(directory, f"emnist-{split}-{part}-images-idx3-ubyte", images, compress=True)
        write(directory, f"emnist-{split}-{part}-labels-idx1-ubyte", labels, compress=True)


def test_emnist_is_turned_upright_and_letters_count_from_0(tmp_path: Path):
    write_emnist(tmp_path, "letters", first_label=1, num_classes=26)
    for name in ("emnist", "emnist:letters"):
        data = load(name, str(tmp_path))
        assert (data.num_classes, data.image_shape, data.name) == (26, (1, 5, 6), "emnist:letters")
        assert torch.equal(data.train.images[:, 0], images_of("train").mT)
        assert torch.equal(data.train.labels, torch.arange(40) % 26)
    write_emnist(tmp_path, "balanced", first_label=0, num_classes=47)
    with pytest.raises(ValueError, match=holding("--data .. emnist:balanced .. emnist:letters")):
        load("emnist", str(tmp_path))
    assert load("emnist:balanced", str(tmp_path)).num_classes == 47


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def put(name: str, array: Tensor) -> Callable[[Path], None]:
    return lambda directory: write(directory, name, array)


@pytest.mark.parametrize(
    ("damage", "named", "message"),
    [
        (edit(IMAGES, lambda c: c[:-1]), IMAGES, r"40 x 6 x 5 = 1200 .*truncated.* 1199"),
        (edit(IMAGES, lambda c: c[:10]), IMAGES, r"truncated.* 10 .* 16"),
        (edit(IMAGES, lambda c: c[:16]), IMAGES, r"truncated: 0 follow"),
        (edit(IMAGES, lambda c: b""), IMAGES, r"truncated: 0 bytes"),
        (edit(IMAGES, lambda c: c + b"xy"), IMAGES, r"1200 bytes, more follow"),
        (edit(IMAGES, lambda c: gzip.compress(c + bytes(10**6))), IMAGES, r"1200 bytes, more follow"),
        (edit(IMAGES, lambda c: c[:4] + b"\xff" * 12 + c[16:]), IMAGES, r"4,294,967,296"),
        (edit(IMAGES, lambda c: b"\x89PNG" + c[4:]), IMAGES, r"89 50 4e 47, not 00 00 08 03"),
        (edit(IMAGES, lambda c: c[:2] + b"\x0d" + c[3:]), IMAGES, r"not 00 00 08 03"),
        (edit(IMAGES, lambda c: gzip.compress(c)[:-30]), IMAGES, r"truncated: .*compressed"),
        (edit(IMAGES, lambda c: gzip.compress(c)[:-3]), IMAGES, r"truncated: .*compressed"),
        (edit(IMAGES, lambda c: gzip.compress(c)[:5]), IMAGES, r"truncated: .*compressed"),
        (edit(IMAGES, lambda c: gzip.compress(c)[:10] + b"\xff" * 500), IMAGES, r"damaged: "),
        (edit(IMAGES, lambda c: gzip.compress(c) + b"tail"), IMAGES, r"damaged: "),
        (edit(IMAGES, lambda c: gzip.compress(c)[:-8] + bytes(8)), IMAGES, r"damaged: "),
        (put(IMAGES, torch.zeros(0, 6, 5)), IMAGES, r"zero images .*0 x 6 x 5"),
        (put(IMAGES, torch.zeros(40, 0, 5)), IMAGES, r"zero images"),
        (put(IMAGES, torch.zeros(40)), IMAGES, r"00 00 08 01, not 00 00 08 03"),
        (put(LABELS, torch.arange(39) % 10), LABELS, r"40 images .*labels-idx1-ubyte .*39 labels"),
        (put(LABELS, torch.arange(40) % 11), LABELS, r"0 to 10\b.* 0 to 9\b"),
        (put(LABELS, torch.zeros(40, 2)), LABELS, r"00 00 08 02, not 00 00 08 01"),
        (edit(LABELS, lambda c: c[:-5]), LABELS, r"40 = 40 bytes, .*35"),
        (put("t10k-images-idx3-ubyte", torch.zeros(20, 7, 5)), "", r"6x5 and 7x5"),
        (put("t10k-labels-idx1-ubyte", torch.full((20,), 255)), "t10k-labels-idx1-ubyte", r"from 255 to 255"),
        (lambda directory: (directory / LABELS).unlink(), LABELS, r"no train-labels-idx1-ubyte or .*\.gz"),
        (
            lambda directory: (directory / "t10k-images-idx3-ubyte").unlink(),
            "t10k-images-idx3-ubyte",
            r"no t10k-images",
        ),
    ],
)
def test_damage_is_named_in_one_line(damage: Callable[[Path], None], named: str, message: str, tmp_path: Path):
    write_mnist(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load("mnist", str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path):
    """40 images by its header, and 64 MiB behind them."""
    path = tmp_path / "bomb.gz"
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(2**20)
    with open(path, "wb") as file:
        file.write(packer.compress(struct.pack(">4B3I", 0, 0, 8, 3, 40, 6, 5)))
        for _ in range(64):
            file.write(packer.compress(zeros))
        file.write(packer.flush())
    tracemalloc.start()
    with pytest.raises(ValueError, match="more follow"):
        read_idx(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_missing_files_are_named_before_any_is_read(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / IMAGES).write_bytes(b"no images")
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="no t10k-labels"):
        load("mnist", str(tmp_path))


def test_letters_with_a_label_0_are_refused(tmp_path: Path):
    write_emnist(tmp_path, "letters", first_label=0, num_classes=26)
    with pytest.raises(ValueError, match=r"0 to 25\b.* 1 to 26\b"):
        load("emnist", str(tmp_path))


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=holding("nowhere .. --data-dir")):
        load("mnist", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=holding("emnist-SPLIT-train-images-idx3-ubyte")):
        load("emnist", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=holding("train-images-idx3-ubyte")):
        load("mnist", str(tmp_path))
