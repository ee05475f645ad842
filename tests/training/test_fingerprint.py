from pathlib import Path

import PIL.Image
import pytest
import torch
from torch import Tensor

from str_triton.cnn.data.arrays import ArrayImages, Augmentation
from str_triton.cnn.data.encoded import IMAGENET, EncodedImages
from str_triton.cnn.data.folder import Files
from str_triton.training.fingerprint import SAMPLES, Fingerprint
from tests.messages import holds

LABELS = torch.arange(40) % 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 40 images that are named by their numbers, each of another grey."""
    for number in range(40):
        PIL.Image.new("L", (8, 8), number).save(tmp_path / f"{number:02}", "PNG")
    return tmp_path


def images(folder: Path, labels: Tensor = LABELS) -> EncodedImages:
    names = [f"{number:02}" for number in range(len(labels))]
    return EncodedImages(Files.of(folder, names), labels, (8, 8), None, Augmentation())


def test_another_number_other_labels_and_other_images_are_named(folder: Path):
    began = images(folder).fingerprint()
    assert began.change(images(folder).fingerprint(), "test") is None
    assert holds(began.change(images(folder, LABELS[:39]).fingerprint(), "test"), "40 test examples .. 39")
    assert holds(began.change(images(folder, LABELS.roll(1)).fingerprint(), "test"), "labels of its test examples")
    for path in folder.iterdir():
        PIL.Image.new("L", (8, 8), 255).save(path, "PNG")
    assert holds(began.change(images(folder).fingerprint(), "test"), f"in {SAMPLES} of {SAMPLES} sampled test")


def test_two_exchanged_images_are_other_data(folder: Path):
    began = images(folder).fingerprint()
    first, second = (folder / "00").read_bytes(), (folder / "01").read_bytes()
    (folder / "00").write_bytes(second)
    (folder / "01").write_bytes(first)
    assert holds(began.change(images(folder).fingerprint(), "training"), f"in 1 of {SAMPLES} sampled training")


def test_files_that_were_repaired_or_went_missing_are_no_other_data(folder: Path):
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for number in range(0, 40, 3):
        (folder / f"{number:02}").write_bytes(b"damaged")
    began = images(folder).fingerprint()
    for path, content in whole.items():
        path.write_bytes(content)
    for number in range(1, 40, 3):
        (folder / f"{number:02}").unlink()
    now = images(folder).fingerprint()
    assert None in began.contents
    assert None in now.contents
    assert began.change(now, "training") is None
    assert now.change(began, "training") is None


def test_only_equal_contents_prove_that_the_data_are_the_same(folder: Path):
    whole = images(folder).fingerprint()
    (folder / "00").unlink()
    missing = images(folder).fingerprint()
    assert whole.proves(images(folder).fingerprint()) is False
    assert (whole.proves(whole), missing.proves(missing), missing.proves(whole)) == (True, True, False)
    assert Fingerprint.of(LABELS).proves(Fingerprint.of(LABELS)) is False
    assert Fingerprint.of_text(LABELS).proves(Fingerprint.of_text(LABELS)) is True


def test_images_in_memory_are_known_by_the_files_that_they_were_decoded_from(folder: Path):
    encoded = images(folder)
    left_out = torch.arange(1, 40)
    arrays = ArrayImages(torch.zeros(39, 3, 8, 8, dtype=torch.uint8), LABELS[left_out], IMAGENET, Augmentation())
    assert arrays.fingerprint().examples == 39
    assert ArrayImages(**vars(arrays) | {"encoded": encoded}).fingerprint() == encoded.fingerprint()
