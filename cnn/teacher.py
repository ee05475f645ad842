"""Knowledge distillation: a trained network's scores as a second target, --teacher."""

import os

from torch import Tensor, nn
from torch.nn import functional as F

from str_triton.cnn.rebuild import rebuild, require_classes
from str_triton.training.errors import warn
from str_triton.training.interface import Interface

TEMPERATURE = 2.0  # divides all scores, so that the teacher's small probabilities count too


def read_teacher(path: str | os.PathLike[str], interface: Interface) -> nn.Module:
    """Return the trained network in a run folder or file, in evaluation mode and without gradients, on the CPU.

    Warns of images of another size or crop than ``interface``. In training the teacher gets the student's images, which
    are standardised with the mean and deviation of the data. Those of the teacher's own data may differ from them as
    little as `Interface.standardisation_change` ignores, for example by some images that were added since. That shifts
    the teacher's inputs by about a hundredth of a deviation at most.

    Raises:
        ValueError: other classes, channels or standardisation than ``interface``, or as `rebuild` does.
        OSError: the file cannot be read.
        UserError: the run's configuration is damaged.
    """
    where = f"--teacher {path}"
    network = rebuild(path, unnamed="a teacher must be a run, or a file that this program or its export has written")
    require_classes(network, interface.outputs, where)
    if interface.images is not None and network.in_channels != interface.images.channels:
        raise ValueError(f"{where}: its images have {network.in_channels} channels, not {interface.images.channels}")
    if network.interface is not None and network.interface.standardisation_change(interface):
        raise ValueError(f"{where}: it standardises images with another mean or deviation than the data")
    theirs = None if network.interface is None else network.interface.images
    if theirs is not None and interface.images is not None and theirs != interface.images:
        ways = [f"{images.width}x{images.height} of {images.part()}" for images in (theirs, interface.images)]
        warn(f"{where} was trained with images of {ways[0]}; those of the data have {ways[1]}")
    return network.model.requires_grad_(False)


def divergence(outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
    """Return the mean divergence of softened scores [B, classes] from a teacher's, a scalar in float32.

    With the temperature T it is T^2 KL(softmax(teacher / T) || softmax(outputs / T)), whose gradient is as large as
    that of cross-entropy.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, section 2.
    """
    ours, theirs = (F.log_softmax(scores.float() / TEMPERATURE, 1) for scores in (outputs, teacher_outputs))
    return TEMPERATURE**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
