"""Folders of images: what is read, how an image is decoded, and what is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from str_triton.cnn.data import batches, load
from str_triton.cnn.data.decoding import centre, decode
from str_triton.cnn.data.encoded import IMAGENET
from tests.messages import holding, holds


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


def test_an_error_comes_without_the_warning_of_skipped_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_split(tmp_path, {"ant": 2, "bee": 2})
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    load(spec(tmp_path))
    assert holds(capsys.readouterr().err, "skipped .. 1 .txt")
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="png"):
        load(spec(tmp_path))
    assert capsys.readouterr().err == ""


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


@pytest.mark.parametrize(
    ("sizes", "expected", "said"),
    [
        ([(20, 16)] * 6, (3, 16, 20), ""),
        ([(300, 200)] * 3 + [(500, 80)] * 3, (3, 224, 224), ""),
        ([(40, 30)] + [(400, 300)] * 5, (3, 224, 224), "1 are at most 64 pixels"),
        ([(400, 300)] + [(64, 48)] * 5, (3, 48, 64), "5 are at most 64 pixels .. 5 are 64x48"),
        ([(5, 5), (64, 48), (300, 10), (64, 48), (64, 48), (6, 6)], (3, 48, 64), "3 are 64x48"),
        ([(40, 30)] * 3 + [(400, 300)] * 3, (3, 224, 224), "3 are at most 64 pixels"),
    ],
)
def test_the_majority_decides_on_the_size(
    tmp_path: Path, capsys: pytest.CaptureFixture, sizes: list, expected: tuple, said: str
):
    for index, size in enumerate(sizes):
        save(tmp_path / "train" / "ab"[2 * index // len(sizes)] / f"{index}.png", size)
    os.symlink("train", tmp_path / "val")
    assert load(spec(tmp_path), None).image_shape == expected
    warning = capsys.readouterr().err
    assert holds(warning, said)
    assert bool(said) == bool(warning)


def test_the_majority_decides_on_mirroring(tmp_path: Path):
    write_split(tmp_path, {"a": 2, "b": 8})
    save(tmp_path / "a" / "0.png", mode="L")
    assert load(spec(tmp_path), None).train.augmentation.flip


def test_small_images_beyond_the_memory_are_decoded_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_split(tmp_path, {"a": 5, "b": 5})
    held = load(spec(tmp_path), None)
    monkeypatch.setattr("str_triton.cnn.data.encoded.MEMORY", 10 * 3 * 16 * 20 - 1)
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
        (remove("train"), "val .*no train"),
        (remove("val"), "train .*neither val nor test.* .*/train"),
        (remove("val", "bee"), "val .*'bee'"),
        (lambda root: save(root / "val" / "cow" / "1.png"), "train .*'cow'"),
        (lambda root: (root / "train" / "cow").mkdir(), r"cow: .*images.* \.png"),
        (
            lambda root: [remove("train", name)(root) for name in ("bee", "cat")],
            "train: .* two classes.* 'ant'",
        ),
        (lambda root: [remove("train", name)(root) for name in ("ant", "bee", "cat")], "two classes.* none"),
        (cut, r"train/bee/1\.png: .*truncated"),
        (overwrite(b""), r"bee/1\.png: .*unknown format"),
        (overwrite(b"GIF89a and no more"), r"bee/1\.png: .*readable image"),
        (overwrite(b"\x89PNG\r\n\x1a\n" + b"\x00" * 40), r"bee/1\.png: .*readable image"),
        (overwrite(b"\xff\xd8\xff\xe0" + b"\x11" * 99), r"bee/1\.png: .*readable image"),
        (lambda root: (root / "train" / "ant" / "0.png").write_bytes(b"first"), r"ant/0\.png: .*readable image"),
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


@pytest.mark.parametrize(
    ("train", "held_out"), [("Train", "Test"), ("training", "validation"), ("TRAIN", "valid"), ("Training", "Testing")]
)
def test_parts_under_other_names(train: str, held_out: str, tmp_path: Path):
    write_split(tmp_path / train, {"cat": 3, "ant": 2})
    write_split(tmp_path / held_out, {"cat": 1, "ant": 1})
    data = load(spec(tmp_path), None)
    assert (data.num_classes, len(data.train), len(data.test)) == (2, 5, 2)


def test_parts_are_not_taken_for_classes(tmp_path: Path, capsys: pytest.CaptureFixture):
    for part in ("seg_train", "seg_test"):
        write_split(tmp_path / "a" / part, {"cat": 2, "ant": 2})
        write_split(tmp_path / "b" / part.replace("seg", "fold").replace("t", "x"), {"cat": 2, "ant": 2})
    with pytest.raises(ValueError, match="'seg_test', 'seg_train'"):
        load(spec(tmp_path / "a"), None)
    load(spec(tmp_path / "b"), None)
    assert "'ant', 'cat'" in capsys.readouterr().err
    for part in ("train", "Train", "val"):
        write_split(tmp_path / "c" / part, {"cat": 2, "ant": 2})
    if len(list((tmp_path / "c").iterdir())) == 3:  # a file system that tells the two apart
        with pytest.raises(ValueError, match="Train and train"):
            load(spec(tmp_path / "c"), None)


def test_leftovers_are_no_classes_and_no_images(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_split(tmp_path, {"cat": 5, "ant": 5})
    for leftover in ("__MACOSX", ".git", "@eaDir", ".ipynb_checkpoints", "cat/@eaDir/0.png", "ant/.thumbs"):
        save(tmp_path / leftover / "x.png")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"")
    data = load(spec(tmp_path), None)
    assert (data.num_classes, len(data.train) + len(data.test)) == (2, 10)
    assert capsys.readouterr().err == ""


def test_links_in_circles_and_other_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_split(tmp_path / "data", {"cat": 5, "ant": 5})
    write_split(tmp_path, {"more": 2})
    os.symlink(tmp_path / "more", tmp_path / "data" / "cat" / "more")
    os.symlink("..", tmp_path / "data" / "cat" / "up")
    os.symlink(".", tmp_path / "data" / "ant" / "same")
    for name in ("a.heic", "b.HEIC", "README"):
        (tmp_path / "data" / "ant" / name).write_text("")
    os.mkfifo(tmp_path / "data" / "ant" / "pipe.png")
    data = load(spec(tmp_path / "data"), None)
    assert len(data.train) + len(data.test) == 12
    said = capsys.readouterr().err
    for count in ("2 circular links", "2 .heic", "1 without an ending", "1 pipes"):
        assert count in said


def test_a_broken_link_is_a_corrupt_image(tmp_path: Path):
    write_split(tmp_path / "train", {"cat": 5, "ant": 5})
    os.symlink("train", tmp_path / "val")
    os.symlink("gone.png", tmp_path / "train" / "cat" / "broken.png")
    with pytest.raises(ValueError, match=r"broken\.png"):
        load(spec(tmp_path), None)
    lines = []
    assert len(load(spec(tmp_path), None, lines.append).train) == 10
    assert len(set(lines)) == 2


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_split(tmp_path, {"cat": 2, "ant": 2})
    scan = os.scandir

    def refuse(path: Path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError, match="cat"):
        load(spec(tmp_path), None)


def test_other_wrong_folders(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere: "):
        load(spec(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match=holding("at least two classes .. none")):
        load(spec(tmp_path), None)
    write_split(tmp_path / "101_ObjectCategories", {"a": 1, "b": 3})
    with pytest.raises(ValueError, match=holding(f"name {tmp_path / '101_ObjectCategories'}")):
        load(spec(tmp_path), None)
    write_split(tmp_path, {"a": 1, "b": 3})
    with pytest.raises(ValueError, match=holding("'a' .. one image")):
        load(spec(tmp_path), None)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_image_damaged_after_the_start_is_named(workers: int, tmp_path: Path):
    write_split(tmp_path, {"a": 3, "b": 3}, size=(80, 80))
    data = load(spec(tmp_path), None)
    _, path = data.train.source.read(2)
    os.truncate(path, 500)
    stream = batches(data.train, batch_size=4, seed=0, epoch=0, augment=True, shuffle=False, workers=workers)
    with pytest.raises(ValueError, match=r"\.png: .*truncated") as caught:
        next(stream)
    assert str(caught.value).startswith(f"{path}: ")
    os.remove(path)
    stream = batches(data.train, batch_size=4, seed=0, epoch=0, augment=True, shuffle=False, workers=workers)
    with pytest.raises(ValueError, match="No such file"):
        next(stream)
