"""The path of large images from the files to the batch, on a made-up ImageNet: both layouts, workers, ranks, damage."""

import os
import pickle
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torch import Tensor

from str_triton.cnn.data import Data, batches, load
from str_triton.cnn.data.arrays import Augmentation
from str_triton.cnn.data.encoded import MAX_CORRUPT_IN_A_ROW, EncodedImages
from str_triton.cnn.data.hub import _labels
from tests.cnn.made_up_imagenet import CMYK, GREY, ON_ITS_SIDE, PNG, UPSIDE_DOWN, pictures, write_imagefolder

datasets = pytest.importorskip("datasets")

CLASSES, PER_CLASS, HELD_OUT = 20, 12, 3
TRAIN = CLASSES * PER_CLASS


@pytest.fixture(scope="module")
def folder(imagenet_folder: Path) -> Data:
    return load(f"imagefolder:{imagenet_folder}")


@pytest.fixture(scope="module")
def hub(imagenet_parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        return load(f"hub:{imagenet_parquet}")


def run(images: EncodedImages, **options: object) -> list[tuple[Tensor, Tensor]]:
    defaults = {"batch_size": 16, "seed": 3, "epoch": 1, "augment": True, "shuffle": True, "workers": 0}
    return list(batches(images, **{**defaults, **options}))


def joined(stream: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*stream, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_both_layouts_hold_the_same_images(folder: Data, hub: Data):
    for data in (folder, hub):
        assert (data.num_classes, data.image_shape) == (CLASSES, (3, 224, 224))
        assert (len(data.train), len(data.test)) == (TRAIN, CLASSES * HELD_OUT)
        assert torch.equal(data.train.labels, torch.arange(TRAIN) // PER_CLASS)
        assert not data.train.in_memory
    for part in ("train", "test"):
        some = torch.tensor([0, CMYK, GREY, ON_ITS_SIDE, UPSIDE_DOWN, PNG, 59])
        options = {"seed": 1, "epoch": 2, "augment": part == "train"}
        (ours, labels), (theirs, their_labels) = (getattr(d, part).batch(some, **options) for d in (folder, hub))
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, theirs)
        assert torch.equal(labels, their_labels)


@pytest.mark.parametrize("number", [0, CMYK, GREY, ON_ITS_SIDE, UPSIDE_DOWN, PNG])
def test_a_test_image_is_its_file_resized_and_cropped(folder: Data, number: int):
    """As Resize(256) and CenterCrop(224) with Pillow, which round the sides of the image, not of the crop."""
    picture = pictures("validation", CLASSES, HELD_OUT, False)[number]
    image = PIL.ImageOps.exif_transpose(PIL.Image.open(BytesIO(picture.content))).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(scale * side) for side in image.size], PIL.Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in image.size)
    expected = np.asarray(image.crop((left, top, left + 224, top + 224)))
    pixels, label = folder.test.batch(torch.tensor([number]), seed=0, epoch=0, augment=False)
    assert label.item() == picture.label
    coarse = [
        np.asarray(x, float).reshape(14, 16, 14, 16, 3).mean((1, 3)) for x in (pixels[0].permute(1, 2, 0), expected)
    ]
    assert np.abs(coarse[0] - coarse[1]).mean() < 2  # moved by half a pixel at most


@pytest.mark.parametrize("layout", ["folder", "hub"])
def test_workers_and_ranks_change_no_bit(layout: str, request: pytest.FixtureRequest):
    images = request.getfixturevalue(layout).test
    whole, labels = joined(run(images))
    parts = [run(images, workers=2, rank=rank, world_size=2) for rank in range(2)]
    both = list(chain.from_iterable(zip(*parts, strict=True)))
    assert torch.equal(joined(both)[0], whole)
    assert torch.equal(joined(both)[1], labels)


class Noting:
    """A source that notes in a file which images are read; appending so few bytes is atomic, by any process."""

    def __init__(self, source: object, path: Path) -> None:
        self.source, self.path = source, str(path)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[str, str | bytes]:
        with open(self.path, "a") as file:
            file.write(f"{index} {os.getpid()}\n")
        return self.source.read(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", ["folder", "hub"])
def test_each_image_is_read_once_over_all_ranks_and_workers(
    layout: str, workers: int, request: pytest.FixtureRequest, tmp_path: Path
):
    images = request.getfixturevalue(layout).test
    noting = EncodedImages(
        Noting(images.source, tmp_path / "log"), images.labels, (8, 8), 0.875, Augmentation(flip=True)
    )
    for rank in range(2):
        run(noting, augment=True, workers=workers, rank=rank, world_size=2)
    notes = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(int(index) for index, _ in notes) == list(range(len(images)))
    assert len({process for _, process in notes}) == (2 * workers or 1)


@pytest.mark.parametrize("layout", ["folder", "hub"])
def test_a_worker_is_handed_no_copy_of_the_images_or_their_names(layout: str, request: pytest.FixtureRequest):
    """Also where workers are not forked but get the set pickled: files by name, tensors in shared memory."""
    source = request.getfixturevalue(layout).train.source
    if layout == "hub":
        assert len(pickle.dumps(source)) < 20_000  # the images are 20 MB
    else:
        tensors = [value for value in vars(source).values() if isinstance(value, Tensor)]
        assert [len(tensor) for tensor in tensors] == [TRAIN]
        assert len(pickle.dumps(source)) < tensors[0].numel() + 1000


def test_labels_are_read_without_the_images(monkeypatch: pytest.MonkeyPatch):
    asked, get = [], datasets.Dataset.__getitem__
    monkeypatch.setattr(
        datasets.Dataset, "__getitem__", lambda rows, key: asked.append(rows.column_names) or get(rows, key)
    )
    rows = datasets.Dataset.from_dict({"image": [b"encoded"] * 5, "label": [4, 3, 2, 1, 0]})
    assert torch.equal(_labels(rows, "label", "x"), torch.tensor([4, 3, 2, 1, 0]))
    assert asked == [["label"]]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """12 training and 6 test images; the last training image and test image 2 are cut short."""
    write_imagefolder(tmp_path, classes=3, per_class=4, held_out=2, truncated=True)
    path = sorted((tmp_path / "val").glob("*/*"))[2]
    path.write_bytes(path.read_bytes()[:3000])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_ends_the_epoch_with_its_name(workers: int, damaged: Path):
    data = load(f"imagefolder:{damaged}")
    with pytest.raises(ValueError, match=r"^\S*n09000002_00011\.JPEG: not a readable image \(.*truncated") as caught:
        run(data.train, batch_size=4, workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_image_stands_in_for_a_corrupt_one(workers: int, damaged: Path):
    """The next one after the last is the first; every batch is as large as ever, on every rank."""
    train, lines = load(f"imagefolder:{damaged}").train, []
    options = {"batch_size": 4, "shuffle": False, "drop_last": True, "workers": workers}
    found = run(train, **options, on_corrupt=lines.append)
    assert [labels.tolist() for _, labels in found] == [[0] * 4, [1] * 4, [2, 2, 2, 0]]
    assert [line.split(": ")[0][-14:] for line in lines] == ["002_00011.JPEG"]
    whole = torch.cat([images for images, _ in found])
    readable = train.batch(torch.arange(11), seed=3, epoch=1, augment=True)[0]
    assert torch.equal(train.normalisation(readable), whole[:11])
    assert not torch.equal(whole[11], whole[0])  # it is cut out elsewhere
    parts = [run(train, **options, rank=rank, world_size=2, on_corrupt=lines.append) for rank in range(2)]
    assert [len(labels) for part in parts for _, labels in part] == [2] * 6
    assert torch.equal(joined(list(chain.from_iterable(zip(*parts, strict=True))))[0], whole)
    assert len(lines) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_in_testing_a_corrupt_image_is_left_out(workers: int, damaged: Path):
    data, lines = load(f"imagefolder:{damaged}"), []
    options = {"batch_size": 2, "augment": False, "shuffle": False, "workers": workers}
    found = run(data.test, **options, on_corrupt=lines.append)
    assert [labels.tolist() for _, labels in found] == [[0, 0], [1], [2, 2]]
    assert len(lines) == 1
    expected = data.test.batch(torch.tensor([0, 1, 3, 4, 5]), seed=0, epoch=0, augment=False)[0]
    assert torch.equal(joined(found)[0], data.test.normalisation(expected))


def test_a_set_may_begin_with_a_corrupt_image(damaged: Path):
    first = min((damaged / "train").glob("*/*"))
    first.write_bytes(b"no image at all")
    lines = []
    assert load(f"imagefolder:{damaged}", None, lines.append).image_shape == (3, 224, 224)
    assert [line.split(": ")[0] for line in lines] == [str(first)]
    with pytest.raises(ValueError, match="not a readable image"):
        load(f"imagefolder:{damaged}")


def test_small_corrupt_images_are_left_out_of_memory(tmp_path: Path):
    for index in range(8):
        path = tmp_path / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (20, 16), (index, 0, 0)).save(path)
    path.write_bytes(path.read_bytes()[:40])
    os.symlink(tmp_path / "train", tmp_path / "val")
    lines = []
    data = load(f"imagefolder:{tmp_path}", None, lines.append)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 1, 3, 5]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 3
    assert len(set(lines)) == 2  # once in training, once in testing


class Nothing:
    """A source whose disk is gone."""

    def __len__(self) -> int:
        return 1_000_000

    def read(self, index: int) -> tuple[str, bytes]:
        return f"image {index}", b""


def test_a_set_that_is_gone_is_not_skipped_image_by_image():
    images, lines = (
        EncodedImages(Nothing(), torch.zeros(1_000_000, dtype=torch.int64), (8, 8), 0.875, Augmentation()),
        [],
    )
    with pytest.raises(ValueError, match=f"^{MAX_CORRUPT_IN_A_ROW} .* image {MAX_CORRUPT_IN_A_ROW + 4}: "):
        images.batch(torch.tensor([5]), seed=0, epoch=0, augment=True, on_corrupt=lines.append)
    assert len(lines) == MAX_CORRUPT_IN_A_ROW
