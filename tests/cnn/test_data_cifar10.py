"""The binary version of CIFAR-10."""

from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton.cnn.data import load
from str_triton.cnn.data.cifar10 import FOLDER, ROW, TEST, TRAIN
from tests.messages import holding


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two images per file: image k of file n has the label k, a red plane n and the blue plane 200 + k."""
    for number, name in enumerate((*TRAIN, *TEST)):
        rows = np.zeros((2, ROW), np.uint8)
        rows[:, 0] = (0, 1)
        rows[:, 1:1025] = number
        rows[:, 2049:] = np.array([[200], [201]])
        rows[:, 1025] = 7  # the green of the upper left pixel
        rows.tofile(tmp_path / name)
    return tmp_path


def test_the_files_are_read_in_order(folder: Path) -> None:
    data = load("cifar10", str(folder))
    assert (len(data.train), len(data.test), data.image_shape, data.num_classes) == (10, 2, (3, 32, 32), 10)
    images, labels = data.train.batch(torch.arange(10), seed=0, epoch=0, augment=False)
    assert labels.tolist() == [0, 1] * 5
    assert images[:, 0, 5, 5].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert images[:, 2, 31, 31].tolist() == [200, 201] * 5
    assert images[3, 1].nonzero().tolist() == [[0, 0]]
    assert data.interface().outputs[:2] == ("airplane", "automobile")


def test_the_archive_s_own_folder_is_found(folder: Path, tmp_path: Path) -> None:
    above = tmp_path / "above"
    above.mkdir()
    (above / FOLDER).symlink_to(folder)
    assert len(load("cifar10", str(above)).test) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "0 bytes"), (bytes(ROW + 1), "damaged"), (b"\x0a" + bytes(ROW - 1), "label 10"), (None, "binary version")],
)
def test_damaged_and_missing_files_are_named(content: bytes | None, message: str, folder: Path) -> None:
    file = folder / "data_batch_3.bin"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=holding(f"data_batch_3.bin .. {message}")):
        load("cifar10", str(folder))


def test_the_folder_must_be_named() -> None:
    with pytest.raises(ValueError, match="cifar10 needs --data-dir"):
        load("cifar10")
