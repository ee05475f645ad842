"""Reading of a data set by its name."""

from str_triton.cnn.data.common import Data, OnCorrupt
from str_triton.cnn.data.digits import load_digits
from str_triton.cnn.data.folder import load_folder
from str_triton.cnn.data.hub import load_hub
from str_triton.cnn.data.idx import SETS, load_idx

KNOWN = "digits, mnist, fashion-mnist, kmnist, emnist[:SPLIT], imagefolder:DIR, hub:NAME"


def load(spec: str, data_dir: str | None = None, on_corrupt: OnCorrupt = None) -> Data:
    """Read the data set that `spec` names.

    - "digits": the bundled handwritten digits;
    - "mnist", "fashion-mnist", "kmnist", "emnist" or "emnist:letters" and other splits: IDX files in `data_dir`;
    - "imagefolder:DIR": a folder per class, see `load_folder`;
    - "hub:NAME": a data set of the Hugging Face hub or a local folder in its format, see `load_hub`.

    Raises ValueError or FileNotFoundError with one line that names the fault. With `on_corrupt` images that cannot be
    decoded are skipped, see `Images.batch`.
    """
    kind, _, place = spec.partition(":")
    if spec in SETS or spec == "emnist":
        return load_idx(spec, data_dir)
    if data_dir is not None:
        raise ValueError(f"--data-dir {data_dir} is for data sets of IDX files; --data {spec} does not take it")
    if spec == "digits":
        return load_digits()
    if kind == "imagefolder" and place:
        return load_folder(place, on_corrupt)
    if kind == "hub" and place:
        return load_hub(place, on_corrupt)
    raise ValueError(f"unknown data set {spec!r}; known are {KNOWN}")
