"""Folders of images: what is read, how an image is decoded, and what is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from cnn.data import batches, load
from cnn.data.decoding import centre, decode
from cnn.data.encoded import IMAGENET


def save(path: Path, size: tuple[int, int] = (20, 16), seed: int = 0, mode: str = "RGB", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(path, **options)


def write_split(root: Path, counts: dict[str, int], **options: object) -> None:
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            save(root / name / f"{index}.png", seed=100 * label + index, **options)


def spec(root: Path) -> str:
    return f"imagefolder:{root}"


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_per_split_and_class(held_out: str, tmp_path: Path):
    write_split(tmp_path / "train", {"cat": 3, "ant": 2, "bee": 4})
    write_split(tmp_path / held_out, {"cat": 1, "ant": 1, "bee": 2})
    save(tmp_path / "train" / "ant" / "deeper" / "er.JPG")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"what macOS leaves")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "classes.csv").write_text("no class")
    data = load(spec(tmp_path), None)
    assert (data.num_classes, data.image_shape, data.name) == (3, (3, 16, 20), spec(tmp_path))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert data.test.labels.tolist() == [0, 1, 1, 2]
    expected = np.asarray(PIL.Image.open(tmp_path / "train" / "bee" / "1.png"))
    assert np.array_equal(data.train.images[4].permute(1, 2, 0), expected)


def test_without_a_split_a_fifth_of_each_class_is_held_out_by_name(tmp_path: Path):
    first = tmp_path / "first"
    write_split(first, {"cat": 10, "ant": 20, "rare": 2})
    data = load(spec(first), None)
    assert [torch.bincount(part.labels).tolist() for part in (data.train, data.test)] == [[16, 8, 1], [4, 2, 1]]
    shutil.copytree(first, tmp_path / "second", copy_function=lambda *paths: shutil.copyfile(*paths))
    again = load(spec(tmp_path / "second"), None)
    assert torch.equal(again.test.images, data.test.images)
    held_out = data.test.images[data.test.labels == 0]
    files = [index for index in range(20) for image in held_out if same(first / "ant" / f"{index}.png", image)]
    assert files == [0, 9, 17, 19]


def same(path: Path, image: torch.Tensor) -> bool:
    return np.array_equal(np.asarray(PIL.Image.open(path)), image.permute(1, 2, 0))


def test_large_images_are_cropped_to_224(tmp_path: Path):
    write_split(tmp_path, {"a": 3, "b": 3}, size=(300, 260))
    data = load(spec(tmp_path), None)
    assert data.image_shape == (3, 224, 224)
    options = {"batch_size": 4, "seed": 0, "shuffle": True, "workers": 0}
    images, labels = next(batches(data.train, epoch=0, augment=True, **options))
    assert images.shape == (4, 3, 224, 224)
    assert labels.shape == (4,)
    assert not torch.equal(next(batches(data.train, epoch=1, augment=True, **options))[0], images)
    index = torch.tensor([0])
    first, _ = data.test.batch(index, seed=0, epoch=0, augment=False)
    name, path = data.test.source.read(0)
    pixels = torch.from_numpy(decode(name, path, (224, 224), centre).copy()).permute(2, 0, 1)
    assert torch.equal(first[0], pixels)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(IMAGENET(first)[0], (pixels / 255 - mean[:, None, None]) / std[:, None, None], atol=1e-5)


def test_small_images_take_the_size_of_the_first(tmp_path: Path):
    save(tmp_path / "a" / "0.png", (64, 48))
    save(tmp_path / "a" / "1.png", (300, 10))
    save(tmp_path / "b" / "0.png", (5, 5))
    save(tmp_path / "b" / "1.png", (64, 48))
    data = load(spec(tmp_path), None)
    assert data.image_shape == (3, 48, 64)
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (3, 48, 64)
    assert data.train.in_memory


def test_small_images_beyond_the_memory_are_decoded_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_split(tmp_path, {"a": 5, "b": 5})
    held = load(spec(tmp_path), None)
    monkeypatch.setattr("cnn.data.encoded.MEMORY", 10 * 3 * 16 * 20 - 1)
    data = load(spec(tmp_path), None)
    assert (held.train.in_memory, data.train.in_memory) == (True, False)
    every = torch.arange(8)
    decoded, labels = data.train.batch(every, seed=1, epoch=2, augment=True)
    expected, expected_labels = held.train.batch(every, seed=1, epoch=2, augment=True)
    assert torch.equal(decoded, expected)
    assert torch.equal(labels, expected_labels)
    assert data.train.normalisation == IMAGENET != held.train.normalisation


@pytest.mark.parametrize(("mode", "flip"), [("L", False), ("LA", False), ("1", False), ("RGB", True), ("RGBA", True)])
def test_grey_images_are_not_mirrored(mode: str, flip: bool, tmp_path: Path):
    write_split(tmp_path, {"a": 2, "b": 2}, mode=mode)
    data = load(spec(tmp_path), None)
    assert data.image_shape == (3, 16, 20)
    assert data.train.augmentation.flip == flip


def remove(*parts: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def cut(root: Path) -> None:
    path = root / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:200])


def overwrite(content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "train" / "bee" / "1.png").write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("train"), r" has val but no train"),
        (remove("val"), r" has train but neither val nor test: .* by naming .*/train"),
        (remove("val", "bee"), r"val lacks the class 'bee'"),
        (lambda root: save(root / "val" / "cow" / "1.png"), r"train lacks the class 'cow'"),
        (lambda root: (root / "train" / "cow").mkdir(), r"cow: zero images \(files ending in \.png"),
        (
            lambda root: [remove("train", name)(root) for name in ("bee", "cat")],
            r"train: .* two classes, has only 'ant'",
        ),
        (lambda root: [remove("train", name)(root) for name in ("ant", "bee", "cat")], r"two classes, has none"),
        (cut, r"train/bee/1\.png: not a readable image \(.*truncated.*\); replace or remove it"),
        (overwrite(b""), r"bee/1\.png: not a readable image \(cannot identify"),
        (overwrite(b"GIF89a and no more"), r"bee/1\.png: not a readable image \("),
        (overwrite(b"\x89PNG\r\n\x1a\n" + b"\x00" * 40), r"bee/1\.png: not a readable image \("),
        (overwrite(b"\xff\xd8\xff\xe0" + b"\x11" * 99), r"bee/1\.png: not a readable image \("),
        (lambda root: (root / "train" / "ant" / "0.png").write_bytes(b"first"), r"ant/0\.png: not a readable image"),
    ],
)
def test_a_wrong_folder_is_named_in_one_line(damage: Callable[[Path], object], message: str, tmp_path: Path):
    for part in ("train", "val"):
        write_split(tmp_path / part, {"cat": 2, "ant": 2, "bee": 2})
    load(spec(tmp_path), None)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load(spec(tmp_path), None)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_wrong_folders(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load(spec(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match="needs a folder for each of at least two classes, has none"):
        load(spec(tmp_path), None)
    write_split(tmp_path, {"a": 1, "b": 3})
    with pytest.raises(ValueError, match="class 'a' has one image"):
        load(spec(tmp_path), None)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_image_damaged_after_the_start_is_named(workers: int, tmp_path: Path):
    write_split(tmp_path, {"a": 3, "b": 3}, size=(80, 80))
    data = load(spec(tmp_path), None)
    _, path = data.train.source.read(2)
    os.truncate(path, 500)
    stream = batches(data.train, batch_size=4, seed=0, epoch=0, augment=True, shuffle=False, workers=workers)
    with pytest.raises(ValueError, match=r"\.png: not a readable image \(.*truncated") as caught:
        next(stream)
    assert str(caught.value).startswith(f"{path}: ")
    os.remove(path)
    stream = batches(data.train, batch_size=4, seed=0, epoch=0, augment=True, shuffle=False, workers=workers)
    with pytest.raises(ValueError, match="No such file"):
        next(stream)
