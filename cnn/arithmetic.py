"""A check whether weights were trained with a network's activation, from the weights alone.

A batch norm's running mean is the mean of its convolution's outputs. It follows from the batch norm before the
convolution: with shift b and scale g, the inputs of the activation between the two are about N(b, g^2), so the mean of
its outputs is known for each activation. Where ReLU and ReLU6 predict different means, the stored one tells them apart.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from str_triton.cnn.mobilenet import PAIRS, TF_EPSILON
from str_triton.training.errors import warn

APART = 0.2  # deviations of a channel by which the two predictions must differ
FEWEST, SHARE = 10, 0.8  # the number of such channels for a verdict, and the share of them that must agree
TF = "tf_"


def warn_of_arithmetic(path: object, name: str, said: str | None, weights: Mapping[str, Tensor]) -> None:
    """Warn if the file names the network's other variant, or if its weights fit the other variant's activation.

    Only MobileNetV1 has two variants, whose weights have the same names and shapes.

    Args:
        path: the file, for the message.
        name: the name of the network that the weights are for, in `str_triton.cnn.models`.
        said: the name in the file, if it holds one.
    """
    if not name.removeprefix(TF).startswith("mobilenetv1"):
        return
    other = name.removeprefix(TF) if name.startswith(TF) else TF + name
    if said is not None:
        if said == other:
            warn(f"{path} holds weights of {said}, which computes in another way than {name}: use --model {said}")
        return
    votes, channels = relu6_votes(weights)
    agreeing = channels - votes if name.startswith(TF) else votes
    if channels >= FEWEST and agreeing >= SHARE * channels:
        activation = "ReLU" if name.startswith(TF) else "ReLU6"
        warn(
            f"{path}: by {agreeing} of {channels} channels whose statistics tell, its weights were trained with "
            f"{activation}, which {name} does not use; --model {other} does"
        )


def relu6_votes(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many channels of a MobileNetV1 tell ReLU6 from ReLU, after the number of those that fit ReLU6."""
    votes = channels = 0
    for norm, conv, following in _links():
        keys = [f"{norm}.weight", f"{norm}.bias", f"{conv}.weight"]
        keys += [f"{following}.running_mean", f"{following}.running_var"]
        if any(key not in weights for key in keys):
            return 0, 0
        scale, shift, kernel, mean, variance = (weights[key].double() for key in keys)
        relu, above = _mean_above(shift, scale, 0.0), _mean_above(shift, scale, 6.0)
        means = [_outputs(kernel, inputs) for inputs in (relu, relu - above)]
        tells = (means[0] - means[1]).abs() > APART * (variance + TF_EPSILON).sqrt()
        fits = (means[1] - mean).abs() < (means[0] - mean).abs()
        votes += int((fits & tells).sum())
        channels += int(tells.sum())
    return votes, channels


def _links() -> Iterator[tuple[str, str, str]]:
    """Yield the names of each batch norm, of the convolution after it, and of that convolution's batch norm."""
    before = "model.0.1"
    for stage in range(1, len(PAIRS) + 1):
        yield before, f"model.{stage}.0", f"model.{stage}.1"
        yield f"model.{stage}.1", f"model.{stage}.3", f"model.{stage}.4"
        before = f"model.{stage}.4"


def _mean_above(shift: Tensor, scale: Tensor, limit: float) -> Tensor:
    """Return E[max(0, x - limit)] for x of N(shift, scale^2)."""
    scale = scale.abs().clamp_min(torch.finfo(scale.dtype).tiny)
    z = (shift - limit) / scale
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return scale * (z * torch.special.ndtr(z) + density)


def _outputs(kernel: Tensor, inputs: Tensor) -> Tensor:
    """Return the mean outputs of a depthwise or pointwise convolution, [out], for mean inputs [in]."""
    total = kernel.sum((2, 3))  # [out, in], or [out, 1] of a depthwise convolution
    return total[:, 0] * inputs if total.shape[1] == 1 else total @ inputs
