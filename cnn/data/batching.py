"""An epoch's batches, the same bits whatever the number of workers, processes, or interruptions."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cnn.data.common import Images, OnCorrupt
from cnn.data.counter_random import permutation


def steps_per_epoch(dataset: Images, batch_size: int, *, drop_last: bool = False, world_size: int = 1) -> int:
    """The number of batches that `batches` gives in an epoch, the same on every rank.

    Raises ValueError where there can be none: a batch size below 1 or not divisible by `world_size`, or, with
    `drop_last`, above the number of images.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: it must be at least 1")
    if batch_size % world_size:
        raise ValueError(f"batch size {batch_size} cannot be divided over {world_size} processes: choose a multiple")
    if drop_last and batch_size > len(dataset):
        raise ValueError(
            f"batch size {batch_size} is larger than the {len(dataset)} training images: choose a smaller one"
        )
    return len(dataset) // batch_size if drop_last else -(-len(dataset) // batch_size)


def batches(
    dataset: Images,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: bool,
    shuffle: bool,
    workers: int,
    start: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    on_corrupt: OnCorrupt = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go once through `dataset`: (images float32 [B, C, H, W], normalised, and labels int64 [B]), both on `device`.

    Order and augmentation are functions of (seed, epoch, index): `workers` (0 decodes in this process; data in memory
    never uses any) changes the speed only, and torch's random state is neither read nor written. `start` is the first
    batch to give, for resuming within an epoch. `batch_size` is that of all ranks together: rank r gets the r-th part
    of each, and every rank gets the same number of batches. Without `drop_last` the last one may be smaller: parts then
    differ by an image, and are empty where fewer images than ranks are left, so that no image is seen twice.

    Pixels travel to the device as uint8, a quarter of the bytes, out of pinned memory where that is a GPU, so that the
    copy waits for nothing; there they are normalised.

    Raises ValueError at once for arguments that make no sense (see `steps_per_epoch`), and on the way when an image
    cannot be decoded; with `on_corrupt` that is told of the image, in this process, and the batch goes on without it
    (`Images.batch`), in training with as many images as ever.
    """
    steps = steps_per_epoch(dataset, batch_size, drop_last=drop_last, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not among 0 ... {world_size - 1}")
    if not 0 <= start <= steps:
        raise ValueError(f"start {start} is not among the epoch's {steps} batches")
    if workers < 0:
        raise ValueError(f"workers {workers}: the number of worker processes cannot be negative")
    order = permutation(len(dataset), seed, epoch) if shuffle else torch.arange(len(dataset))
    source = _Batches(dataset, order, batch_size, seed, epoch, augment, rank, world_size, on_corrupt is not None)
    device = torch.device(device)
    items = _items(source, range(start, steps), 0 if dataset.in_memory else workers, pin=device.type == "cuda")
    return _on_device(items, dataset, device, on_corrupt)


class _Item(NamedTuple):
    """A batch as it leaves the data set: uint8 images, labels, and the lines about corrupt images."""

    images: Tensor
    labels: Tensor
    corrupt: list[str]

    def pin_memory(self) -> "_Item":
        """What DataLoader calls, in a thread beside the training."""
        return self._replace(images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True, eq=False)
class _Batches:
    """What a worker needs: the k-th item is this rank's part of batch k, or the error that it met."""

    dataset: Images
    order: Tensor
    batch_size: int
    seed: int
    epoch: int
    augment: bool
    rank: int
    world_size: int
    skip_corrupt: bool

    def __getitem__(self, step: int) -> _Item | Exception:
        members = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        part = members.tensor_split(self.world_size)[self.rank]
        corrupt: list[str] = []
        on_corrupt = corrupt.append if self.skip_corrupt else None
        options = {"seed": self.seed, "epoch": self.epoch, "augment": self.augment, "on_corrupt": on_corrupt}
        try:
            return _Item(*self.dataset.batch(part, **options), corrupt)
        except (OSError, ValueError) as error:
            # Raised in a worker, it would come out with that worker's traceback for a message.
            return error


def _items(source: _Batches, steps: range, workers: int, pin: bool) -> Iterable[_Item | Exception]:
    if workers == 0:
        return map(source.__getitem__, steps)
    return DataLoader(
        source,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_the_group,
        pin_memory=pin,
        generator=torch.Generator(),  # or it would draw its workers' seed from the global one
    )


def _on_device(
    items: Iterable[_Item | Exception], dataset: Images, device: torch.device, on_corrupt: OnCorrupt
) -> Iterator[tuple[Tensor, Tensor]]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        for line in item.corrupt:
            on_corrupt(line)
        if device.type == "cuda" and not item.images.is_pinned():
            item = item.pin_memory()
        images = dataset.normalisation(item.images.to(device, non_blocking=True))
        yield images, item.labels.to(device, non_blocking=True)


def _unchanged(item: object) -> object:
    return item


def _leave_the_group(worker: int) -> None:
    """Ctrl-C and `timeout` signal the whole process group: only the training process is to hear that.

    Ignoring the signals instead would hang the exit of a program that leaves an epoch open: SIGTERM is how Python ends
    the children that are left.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
