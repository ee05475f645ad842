"""The batches of an epoch. Their bits do not depend on the number of workers or processes, or on interruptions."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from str_triton.cnn.data.common import Images, OnCorrupt
from str_triton.cnn.data.counter_random import permutation


def steps_per_epoch(dataset: Images, batch_size: int, *, drop_last: bool = False, world_size: int = 1) -> int:
    """Return the number of batches that `batches` yields in an epoch. It is the same on every rank.

    Raises ValueError for a batch size below 1 or not divisible by `world_size`, and with `drop_last` for one above the
    number of images.
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
    """Yield the batches of one epoch: normalised images, float32 [B, C, H, W], and labels, int64 [B], on `device`.

    Order and augmentation are functions of (seed, epoch, index). Torch's random state is neither read nor written.
    Without `drop_last` the last batch may be smaller. The ranks' parts of it then differ by one image. A part is empty
    where fewer images than ranks are left, so that no image is seen twice.

    Pixels are copied to the device as uint8, a quarter of the bytes, and normalised there. For a GPU they are copied
    from pinned memory, so that the copy is asynchronous.

    Args:
        batch_size: the batch size of all ranks together; rank r gets the r-th part of each batch.
        workers: processes that decode images; 0 decodes in this process. They change the speed only. Data in memory
            never use any.
        start: the first batch to yield, for resuming within an epoch.
        on_corrupt: called, in this process, with a line about each image that cannot be decoded. The batch goes on
            without that image (see `Images.batch`); in training another image takes its place.

    Raises:
        ValueError: at once for invalid arguments (see `steps_per_epoch`), and during the epoch when an image cannot be
            decoded and `on_corrupt` is None.
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
    """A batch before normalisation: uint8 images, labels, and the lines about corrupt images."""

    images: Tensor
    labels: Tensor
    corrupt: list[str]

    def pin_memory(self) -> "_Item":
        """Copy the batch to pinned memory. DataLoader calls this in a thread of its own."""
        return self._replace(images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True, eq=False)
class _Batches:
    """One rank's batches of an epoch, as a dataset for DataLoader: item k is its part of batch k, or the error met."""

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
        try:
            images, labels = self.dataset.batch(
                part, seed=self.seed, epoch=self.epoch, augment=self.augment, on_corrupt=on_corrupt
            )
            return _Item(images, labels, corrupt)
        except (OSError, ValueError) as error:
            # DataLoader would replace the message of an error raised in a worker by the worker's traceback.
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
        generator=torch.Generator(),  # by default DataLoader draws the workers' seed from the global generator
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
    """Move a worker to its own process group, so that only the training process gets Ctrl-C and `timeout`'s signal.

    A worker must not ignore these signals: Python ends its remaining children with SIGTERM, so a program that stops in
    the middle of an epoch would hang at exit.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
