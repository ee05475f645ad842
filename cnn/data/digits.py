"""The handwritten digits that come with the project: 1,797 images of 8 x 8 pixels in 17 levels of grey.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998 (its test
set, as scikit-learn distributes it), CC BY 4.0.
"""

import gzip
from pathlib import Path

import numpy as np
import torch

from str_triton.cnn.data.arrays import ArrayImages, Augmentation, Normalisation
from str_triton.cnn.data.common import Data, stratified_split
from str_triton.cnn.data.counter_random import order_keys

NAMES = tuple("0123456789")
LEVEL = 16  # the file's white
FILE = Path(__file__).parents[1] / "assets" / "digits.csv.gz"


def load_digits() -> Data:
    """Read the digits and split them 80/20 by class: 1,438 and 359 images, whatever the seed of the training.

    The file has levels from 0 to 16. They become pixels from 0 to 255, as in every image file.

    The images are not augmented. In trials, shifts by one pixel (large for this size) left test accuracy the same or a
    little lower, and small rotations changed it by no more than the choice of a seed does.
    """
    with gzip.open(FILE, "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    levels, labels = rows[:, :64].reshape(-1, 1, 8, 8), rows[:, 64].long()
    images = (levels * (255 / LEVEL)).round().to(torch.uint8)
    train, test = stratified_split(labels, order_keys(len(labels), 0, 0), NAMES)
    normalisation, augmentation = Normalisation.of(images[train]), Augmentation()
    return Data(
        train=ArrayImages(images[train], labels[train], normalisation, augmentation),
        test=ArrayImages(images[test], labels[test], normalisation, augmentation),
        class_names=NAMES,
        image_shape=(1, 8, 8),
        name="digits",
    )
