from pathlib import Path

import pytest
import torch
from torch import Tensor

from str_triton.cnn.data.arrays import ArrayImages, Augmentation
from str_triton.cnn.data.encoded import IMAGENET, EncodedImages
from str_triton.cnn.data.folder import Files
from str_triton.training.fingerprint import SAMPLES
from tests.messages import holds

LABELS = torch.arange(40) % 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 40 files that are named by their numbers and cannot be decoded."""
    for number in range(40):
        (tmp_path / f"{number:02}").write_bytes(b"%d" % number)
    return tmp_path


def images(folder: Path, labels: Tensor = LABELS) -> EncodedImages:
    names = [f"{number:02}" for number in range(len(labels))]
    return EncodedImages(Files.of(folder, names), labels, (8, 8), None, Augmentation())


def test_another_number_other_labels_and_other_images_are_named(folder: Path):
    began = images(folder).fingerprint()
    assert began.change(images(folder).fingerprint()) is None
    assert holds(began.change(images(folder, LABELS[:39]).fingerprint()), "40 training examples .. 39")
    assert holds(began.change(images(folder, LABELS.roll(1)).fingerprint()), "labels")
    for path in folder.iterdir():
        path.write_bytes(b"other")
    assert holds(began.change(images(folder).fingerprint()), f"of {SAMPLES} sampled .. {SAMPLES} have changed")


def test_files_that_were_repaired_or_went_missing_are_no_other_data(folder: Path):
    began = images(folder).fingerprint()
    for number in range(0, 40, 3):
        (folder / f"{number:02}").write_bytes(b"repaired")
    for number in range(1, 40, 3):
        (folder / f"{number:02}").unlink()
    now = images(folder).fingerprint()
    assert None in now.contents
    assert began.change(now) is None
    assert now.change(began) is None


def test_images_in_memory_are_known_by_the_files_that_they_were_decoded_from(folder: Path):
    encoded = images(folder)
    left_out = torch.arange(1, 40)
    arrays = ArrayImages(torch.zeros(39, 3, 8, 8, dtype=torch.uint8), LABELS[left_out], IMAGENET, Augmentation())
    assert arrays.fingerprint().examples == 39
    assert ArrayImages(**vars(arrays) | {"encoded": encoded}).fingerprint() == encoded.fingerprint()
