"""Images for training and testing: `load` reads a data set, `batches` goes through it.

Everything random (the order, the augmentation) is a function of (seed, epoch, index) alone: `counter_random.py`.
"""

from cnn.data.batching import batches, steps_per_epoch
from cnn.data.common import Data, Images
from cnn.data.sources import load

__all__ = ["Data", "Images", "batches", "load", "steps_per_epoch"]
