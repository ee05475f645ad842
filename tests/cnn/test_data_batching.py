"""Batches: the same bits whatever the workers, the ranks, the place of resuming, and torch's random state."""

import io
import itertools
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from str_triton.cnn.data import batches, steps_per_epoch
from str_triton.cnn.data.arrays import ArrayImages, Augmentation, Normalisation
from str_triton.cnn.data.counter_random import permutation
from str_triton.cnn.data.encoded import EncodedImages

ROOT = Path(__file__).parents[2]
COUNT = 23


class Pictures:
    """A source of PNG files in memory; `broken` is the number of one that is cut short."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int) -> tuple[str, bytes]:
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        content = file.getvalue()
        return f"picture {index}", content[: len(content) // 2] if index == self.broken else content


def encoded(broken: int | None = None, crop: float | None = None) -> EncodedImages:
    labels = torch.arange(COUNT) % 3
    return EncodedImages(Pictures(broken), labels, (8, 9), crop, Augmentation(padding=2, flip=True))


def arrays(count: int = COUNT) -> ArrayImages:
    images = torch.randint(0, 256, (count, 2, 8, 9), dtype=torch.uint8)
    return ArrayImages(images, torch.arange(count), Normalisation.of(images), Augmentation(padding=2, flip=True))


def run(dataset: object, **options: object) -> list[tuple[Tensor, Tensor]]:
    defaults = {"batch_size": 5, "seed": 1, "epoch": 2, "augment": True, "shuffle": True, "workers": 0}
    return list(batches(dataset, **{**defaults, **options}))


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("crop", [None, 0.875])
def test_workers_change_no_bit(crop: float | None):
    alone = run(encoded(crop=crop))
    assert [len(labels) for _, labels in alone] == [5, 5, 5, 5, 3]
    assert alone[0][0].shape == (5, 3, 8, 9)
    assert alone[0][0].dtype == torch.float32
    assert alone[0][0].is_contiguous()
    assert alone[0][1].dtype == torch.int64
    for workers in (1, 2):
        assert_same(run(encoded(crop=crop), workers=workers), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_state_is_neither_read_nor_written(workers: int):
    expected = run(encoded(), workers=workers)
    torch.manual_seed(99)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert_same(run(encoded(), workers=workers), expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_start_resumes_within_the_epoch(start: int, workers: int):
    assert_same(run(encoded(), start=start, workers=workers), run(encoded())[start:])


def test_order_is_that_of_seed_and_epoch():
    dataset = arrays()
    labels = torch.cat([labels for _, labels in run(dataset)])
    assert torch.equal(labels, permutation(COUNT, 1, 2))
    assert torch.equal(torch.cat([labels for _, labels in run(dataset, shuffle=False)]), torch.arange(COUNT))


def test_augmentation_belongs_to_seed_epoch_and_index():
    dataset, every = arrays(), torch.arange(COUNT)
    together, labels = dataset.batch(every, seed=1, epoch=2, augment=True)
    assert torch.equal(labels, every)
    for index in (0, 7, 22):
        alone, _ = dataset.batch(torch.tensor([index]), seed=1, epoch=2, augment=True)
        assert torch.equal(alone[0], together[index])
    plain, _ = dataset.batch(every, seed=1, epoch=2, augment=False)
    for seed, epoch in ((1, 3), (2, 2)):
        assert not torch.equal(dataset.batch(every, seed=seed, epoch=epoch, augment=True)[0], together)
        assert torch.equal(dataset.batch(every, seed=seed, epoch=epoch, augment=False)[0], plain)


def test_augmentation_is_a_shift_and_a_mirroring():
    """Every augmented image is one of the 2 x 25 that the definition allows, and all of these occur."""
    image = torch.arange(1, 1 + 2 * 6 * 7, dtype=torch.uint8).view(2, 6, 7)
    count, pad = 2000, 2
    images = Augmentation(pad, flip=True)(image.expand(count, -1, -1, -1), torch.rand(3, count))
    padded = torch.nn.functional.pad(image, [pad] * 4)
    windows = [padded[:, top : top + 6, left : left + 7] for top, left in itertools.product(range(5), repeat=2)]
    allowed = torch.stack([window.flip(-1) if flip else window for window in windows for flip in (False, True)])
    matches = (images[:, None] == allowed).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    assert (matches.sum(0) > 10).all()
    unflipped = Augmentation(pad)(image.expand(count, -1, -1, -1), torch.rand(3, count))
    assert (unflipped[:, None] == allowed[::2]).flatten(2).all(2).any(1).all()
    assert torch.equal(Augmentation()(image[None], torch.rand(3, 1)), image[None])


def test_normalisation_is_that_of_the_pixels():
    images = torch.randint(0, 256, (5000, 3, 4, 5), dtype=torch.uint8)
    images[:, 1] //= 4
    images[:, 2] = 9  # no variance at all
    normalised = Normalisation.of(images)(images).double()
    assert torch.allclose(normalised.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(normalised[:, :2].std((0, 2, 3)), torch.ones(2, dtype=torch.float64), atol=1e-4)
    assert (normalised[:, 2] == 0).all()


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_each_batch(drop_last: bool):
    """23 images in batches of 6: three full ones and five images, which three ranks share as 2, 2, 1."""
    dataset = arrays()
    whole = run(dataset, batch_size=6, drop_last=drop_last)
    parts = [run(dataset, batch_size=6, drop_last=drop_last, rank=rank, world_size=3) for rank in range(3)]
    steps = steps_per_epoch(dataset, 6, drop_last=drop_last, world_size=3)
    assert [len(part) for part in parts] == [steps] * 3 == [3 if drop_last else 4] * 3
    assert_same([tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)], whole)
    if not drop_last:
        assert [len(part[-1][1]) for part in parts] == [2, 2, 1]


def test_more_ranks_than_images_left_gives_an_empty_batch():
    parts = [run(arrays(9), batch_size=4, rank=rank, world_size=4) for rank in range(4)]
    assert [len(part[-1][1]) for part in parts] == [1, 0, 0, 0]
    assert parts[3][-1][0].shape == (0, 2, 8, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 24, "drop_last": True}, "batch size 24 .*23 training images"),
        ({"batch_size": 5, "world_size": 2}, "batch size 5 .*2 processes"),
        ({"rank": 1}, "rank 1"),
        ({"start": 6}, "start 6"),
        ({"start": -1}, "start -1"),
        ({"workers": -1}, "workers -1"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict, message: str):
    defaults = {"batch_size": 5, "seed": 0, "epoch": 0, "augment": True, "shuffle": True, "workers": 0}
    with pytest.raises(ValueError, match=message):
        batches(arrays(), **{**defaults, **options})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(workers: int):
    stream = batches(encoded(broken=7), batch_size=5, seed=0, epoch=0, augment=True, shuffle=False, workers=workers)
    assert next(stream)[1].tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match=r"^picture 7: ") as caught:
        next(stream)
    assert "\n" not in str(caught.value)


def test_signals_to_the_group_reach_the_training_process_alone(tmp_path: Path):
    """And a program that leaves an epoch open ends."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(5):
            PIL.Image.new("RGB", (70, 70), (index, index, index)).save(tmp_path / name / f"{index}.png")
    code = f"""
import os, signal, time
from str_triton.cnn.data import batches, load

heard = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: heard.append(number))
train = load("imagefolder:{tmp_path}", None).train
stream = batches(train, batch_size=1, seed=0, epoch=0, augment=True, shuffle=True, workers=1)
next(stream)
os.killpg(0, signal.SIGINT)
os.killpg(0, signal.SIGTERM)
time.sleep(0.2)
print(len(heard), 1 + sum(1 for _ in stream))
left_open = batches(train, batch_size=1, seed=0, epoch=0, augment=True, shuffle=True, workers=1)
next(left_open)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert (result.stdout, result.stderr, result.returncode) == ("2 8\n", "", 0)


def test_workers_stop_with_an_epoch_that_is_left():
    stream = batches(encoded(), batch_size=2, seed=1, epoch=2, augment=True, shuffle=True, workers=2)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    stream.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_memory_needs_no_workers():
    stream = batches(arrays(), batch_size=2, seed=1, epoch=2, augment=True, shuffle=True, workers=2)
    next(stream)
    assert not multiprocessing.active_children()


def test_importing_takes_neither_pillow_nor_datasets():
    code = (
        "import sys; from str_triton.cnn.data import load; load('digits');"
        "print(*{'PIL', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("\n", "")
