"""Images for training and testing: `load` reads a data set, `batches` iterates over it.

Order and augmentation depend only on (seed, epoch, index), see `counter_random.py`.
"""

from str_triton.cnn.data.batching import batches, steps_per_epoch
from str_triton.cnn.data.common import Data, Images
from str_triton.cnn.data.sources import load

__all__ = ["Data", "Images", "batches", "load", "steps_per_epoch"]
