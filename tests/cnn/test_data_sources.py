"""Data sets by name, and the digits that come with the project."""

from pathlib import Path

import pytest
import torch

from str_triton.cnn.data import load
from tests.messages import holding


@pytest.mark.parametrize(
    ("spec", "data_dir", "message"),
    [
        ("flowers", None, r"'flowers'; .*digits, cifar10, mnist, .*, hub:NAME$"),
        ("digts", None, r"'digts'; did you mean digits\?$"),
        ("fashionmnist", None, r"'fashionmnist'; .*fashion-mnist"),
        ("imagefodler:x", None, r"'imagefodler:x'; .* imagefolder:DIR\?$"),
        ("", None, "''; "),
        ("imagefolder", None, "'imagefolder'; .* imagefolder:DIR"),
        ("imagefolder:", None, "'imagefolder:'; .* imagefolder:DIR"),
        ("emnist:greek", None, "'emnist:greek'; .* emnist\\[:SPLIT\\]"),
        ("digits", "somewhere", "--data-dir somewhere .*--data digits does not"),
        ("mnist", None, "mnist needs --data-dir"),
    ],
)
def test_an_unknown_set_is_refused(spec: str, data_dir: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        load(spec, data_dir)


@pytest.mark.parametrize(
    ("file", "form"),
    [
        ("cat/1.png", "imagefolder:{}"),
        ("data/train-0.parquet", "hub:{}"),
        ("train-images-idx3-ubyte.gz", "fashion-mnist .. --data-dir {}"),
        ("data_batch_1.bin", "cifar10 .. --data-dir {}"),
        ("data_batch_1", "binary version .. pickles"),
    ],
)
def test_a_bare_folder_names_its_form(file: str, form: str, tmp_path: Path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=holding(f"'{tmp_path}' .. " + form.format(tmp_path))):
        load(str(tmp_path), image_size=64)


@pytest.mark.parametrize("spec", ["digits", "fashion-mnist"])
def test_images_of_a_fixed_size_take_no_other(spec: str):
    with pytest.raises(ValueError, match=f"--image-size 64: .*--data {spec}"):
        load(spec, "nowhere" if spec != "digits" else None, image_size=64)


def test_digits_are_all_there_in_a_fixed_stratified_split():
    data = load("digits", None)
    assert (len(data.train), len(data.test), data.num_classes, data.image_shape) == (1438, 359, 10, (1, 8, 8))
    counts = [torch.bincount(part.labels, minlength=10) for part in (data.train, data.test)]
    assert torch.equal(sum(counts), torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]))
    assert torch.equal(counts[1], (sum(counts) * 0.2).round().long())
    assert data.test.labels[:20].tolist() == [7, 7, 8, 0, 2, 9, 5, 6, 1, 0, 8, 1, 6, 3, 3, 7, 3, 6, 6, 1]
    seen = {tuple(image.flatten().tolist()) for image in data.train.images}
    assert not any(tuple(image.flatten().tolist()) in seen for image in data.test.images)
    zero = data.train.images[0, 0] if data.train.labels[0] == 0 else data.test.images[0, 0]
    levels = [0, 0, 5, 13, 9, 1, 0, 0]  # the file's first row, upright
    assert zero[0].tolist() == [round(level * 255 / 16) for level in levels]
    assert (int(data.train.images.min()), int(data.train.images.max())) == (0, 255)
