"""The throughput of the image loader on one core, compared with Pillow's plain decoder.

The files are JPEGs similar to photographs, of ImageNet's mean size, 500 x 375 pixels and about 110 kB. Two decoders
take turns in one process. Pillow decodes each file whole, with `Image.open(file).convert("RGB")`, without and with a
draft mode of 224 x 224. The loader makes training batches (random crop, mirroring) and test batches (central crop) of
the same files, as uint8. The script also measures the loader with worker processes, and the other costs of a batch:
reading rows of a memory-mapped table, and normalising on the CPU.

    python -m benchmarks.speed.image_loader
"""

import os
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL
import PIL.features
import PIL.Image
import torch

from benchmarks.timing import alternating, median_ratio, write
from str_triton.cnn.data import batches
from str_triton.cnn.data.arrays import Augmentation
from str_triton.cnn.data.decoding import TEST_SHARE_OF_SIDE
from str_triton.cnn.data.encoded import EncodedImages
from str_triton.cnn.data.folder import Files
from str_triton.cnn.data.hub import Column
from tests.cnn.made_up_imagenet import photograph

SIZE, QUALITY = (500, 375), 88
FILES, ROUNDS = 32, 9
STREAM = 480  # images to time the worker processes with
ROWS = 2000


def encoded(number: int) -> bytes:
    file = BytesIO()
    PIL.Image.fromarray(photograph(number, 512)[: SIZE[1], : SIZE[0]]).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def loader(paths: list[str]) -> EncodedImages:
    labels = torch.zeros(len(paths), dtype=torch.int64)
    return EncodedImages(Files.of(Path("/"), paths), labels, (224, 224), TEST_SHARE_OF_SIDE, Augmentation(flip=True))


def one_core(paths: list[str]) -> dict[str, Any]:
    """Measure the seconds per image of all decoders in turn."""
    images, every, epoch = loader(paths), torch.arange(len(paths)), iter(range(10**6))

    def pillow() -> None:
        for path in paths:
            PIL.Image.open(path).convert("RGB")

    def draft() -> None:
        for path in paths:
            image = PIL.Image.open(path)
            image.draft("RGB", (224, 224))
            image.convert("RGB")

    functions: dict[str, Callable[[], Any]] = {
        "pillow": pillow,
        "pillow, draft": draft,
        "training": lambda: images.batch(every, seed=0, epoch=next(epoch), augment=True),
        "testing": lambda: images.batch(every, seed=0, epoch=0, augment=False),
    }
    seconds = alternating(functions, ROUNDS)
    return {
        name: {
            "images_per_second": round(len(paths) / median(seconds[name]), 1),
            "share_of_pillow": round(1 / median_ratio(seconds, name, "pillow"), 3),
        }
        for name in functions
    }


def with_workers(paths: list[str], workers: int) -> float:
    """Measure the throughput of `batches`, normalised, after the first batch of each worker."""
    images = loader((paths * STREAM)[:STREAM])
    stream = batches(images, batch_size=16, seed=0, epoch=0, augment=True, shuffle=True, workers=workers)
    for _ in range(max(1, 2 * workers)):
        next(stream)
    begin, count = time.perf_counter(), 0
    for _, labels in stream:
        count += len(labels)
    return count / (time.perf_counter() - begin)


def besides(contents: list[bytes], folder: Path) -> dict[str, float]:
    """Measure the costs of a batch other than decoding, in microseconds per image."""
    import datasets

    datasets.disable_progress_bars()
    rows = [{"image": {"bytes": contents[index % len(contents)], "path": None}} for index in range(ROWS)]
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    mapped = Column(datasets.load_from_disk(str(folder)).with_format("arrow"), "table", "")
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    pixels = torch.zeros(FILES, 3, 224, 224, dtype=torch.uint8)
    seconds = alternating(
        {
            "row of a memory-mapped table": lambda: [mapped.read(index) for index in order],
            "normalising on the CPU": lambda: EncodedImages.normalisation(pixels),
        },
        rounds=5,
    )
    counts = {"row of a memory-mapped table": ROWS, "normalising on the CPU": FILES}
    return {name: round(median(times) / counts[name] * 1e6, 1) for name, times in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        contents = [encoded(number) for number in range(FILES)]
        paths = [os.path.join(directory, f"{number}.JPEG") for number in range(FILES)]
        for path, content in zip(paths, contents, strict=True):
            Path(path).write_bytes(content)
        result = {
            "pillow": PIL.__version__,
            "libjpeg_turbo": PIL.features.version("libjpeg_turbo"),
            "image": {"size": SIZE, "mean_bytes": sum(map(len, contents)) // FILES},
            "one_core": one_core(paths),
            "workers_images_per_second": {
                str(workers): round(median(with_workers(paths, workers) for _ in range(3)), 1) for workers in (0, 1, 2)
            },
            "cores": os.cpu_count(),
            "microseconds_per_image": besides(contents, Path(directory) / "table"),
        }
    write("image_loader", result)


if __name__ == "__main__":
    main()
