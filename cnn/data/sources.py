"""Reading of a data set by its name."""

from dataclasses import replace

from torch.nn import functional as F

from str_triton.arguments import unknown_data
from str_triton.cnn.data.arrays import ArrayImages
from str_triton.cnn.data.cifar10 import load_cifar10
from str_triton.cnn.data.common import Data, NetworkInput, OnCorrupt
from str_triton.cnn.data.decoding import crop_of
from str_triton.cnn.data.digits import load_digits
from str_triton.cnn.data.folder import load_folder
from str_triton.cnn.data.hub import load_hub
from str_triton.cnn.data.idx import SETS, load_idx

KNOWN = ("digits", "cifar10", "mnist", "fashion-mnist", "kmnist", "emnist[:SPLIT]", "imagefolder:DIR", "hub:NAME")
LAYOUTS = {
    "*-idx3-ubyte*": "write the name of its data set, such as mnist or fashion-mnist, and --data-dir DIR",
    "data_batch_1.bin": "write cifar10 and --data-dir DIR",
    "data_batch_1": "take CIFAR-10's binary version (this one is of pickles, which can run code), unpack it, and write "
    "cifar10 and --data-dir with its folder",
    "dataset_dict.json": "write hub:DIR",
    "*.parquet": "write hub:DIR",
    "*/*.parquet": "write hub:DIR",
    "*": "of images, write imagefolder:DIR",
}
"""What to write for a folder whose files are like the pattern."""


def load(
    spec: str,
    data_dir: str | None = None,
    on_corrupt: OnCorrupt = None,
    image_size: int | None = None,
    taken_by: NetworkInput | None = None,
) -> Data:
    """Read the data set that `spec` names.

    - "digits": the bundled handwritten digits;
    - "cifar10": CIFAR-10's binary version in `data_dir`, see `load_cifar10`;
    - "mnist", "fashion-mnist", "kmnist", "emnist" or "emnist:letters" and other splits: IDX files in `data_dir`;
    - "imagefolder:DIR": a folder per class, see `load_folder`;
    - "hub:NAME": a data set of the Hugging Face hub or a local folder in its format, see `load_hub`.

    `image_size` is the height and width that the images of a folder or of the hub are scaled to, by default 224 or the
    size of small images. With `taken_by` the test images are cropped, scaled and normalised as that
    network takes them, and the training images need not be readable.

    Raises ValueError or FileNotFoundError with one line that names the fault. With `on_corrupt` images that cannot be
    decoded are skipped, see `Images.batch`.
    """
    kind, _, place = spec.partition(":")
    is_idx, has_place = spec in SETS or spec == "emnist", kind in ("imagefolder", "hub") and place != ""
    if not (is_idx or has_place or spec in ("digits", "cifar10")):
        raise ValueError(unknown_data(spec, KNOWN, LAYOUTS))
    if data_dir is not None and not (is_idx or spec == "cifar10"):
        raise ValueError(f"--data-dir {data_dir} is for cifar10 and IDX files; --data {spec} does not take it")
    if image_size is not None and not has_place:
        raise ValueError(f"--image-size {image_size}: the images of --data {spec} have a size of their own")
    if is_idx:
        return _as_taken(load_idx(spec, data_dir), taken_by)
    if spec == "digits":
        return _as_taken(load_digits(), taken_by)
    if spec == "cifar10":
        return _as_taken(load_cifar10(data_dir), taken_by)
    if kind == "imagefolder":
        return load_folder(place, on_corrupt, image_size, taken_by)
    return load_hub(place, on_corrupt, image_size, taken_by)


def _as_taken(data: Data, network: NetworkInput | None) -> Data:
    """Return data in memory with the test images as a network takes them."""
    if network is None:
        return data
    assert isinstance(data.test, ArrayImages)
    channels, *size = data.image_shape
    left, top, right, bottom = crop_of(network.images.crop)(size[1], size[0])
    height, width = network.images.height, network.images.width
    pixels = data.test.images[:, :, top:bottom, left:right]
    if pixels.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    test = replace(data.test, images=pixels, normalisation=network.normalisation)
    return replace(data, test=test, image_shape=(channels, height, width), crop=network.images.crop)
