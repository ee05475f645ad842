"""Training that starts from a trained network: --pretrained."""

import os
from collections.abc import Sequence

from torch import nn

from str_triton.cnn.arithmetic import warn_of_arithmetic
from str_triton.cnn.class_names import class_change
from str_triton.cnn.models import state_shapes
from str_triton.cnn.weights import fill, read_file, read_weights, without_prefix
from str_triton.training.errors import warn


def check_start(path: str | os.PathLike[str], *, needs_zeros: bool) -> None:
    """Check the file for `start_from` by reading it. Raise as `start_from` does.

    With ``needs_zeros``, also raise ValueError if no weight of two or more dimensions has zeros.
    """
    weights = read_weights(path)
    if needs_zeros and all(weight.dim() < 2 or bool(weight.all()) for weight in weights.values()):
        raise ValueError(f"--method keep-zeros: no weight in --pretrained {path} is zero")


def start_from(
    path: str | os.PathLike[str],
    model: nn.Module,
    name: str,
    in_channels: int,
    *,
    class_names: Sequence[str] | None,
) -> None:
    """Give a plain network the weights and buffers of a trained one, in place. See also `warn_of_arithmetic`.

    Warns if the file names other classes than the data's.

    Args:
        path: a file or run folder of any kind that `str_triton.cnn.weights.read_weights` takes. All entries of the
            network must be there, except the counts of batches (num_batches_tracked), which old files lack.
        model: `build(name, in_channels=in_channels)` with any number of classes.
        class_names: the classes of the data; None: keep the model's own classifier instead of the file's.

    Raises:
        ValueError: an unfinished run, not a file of weights, weights of another network (the message names the first
            key that does not fit), another number of classes, or the same classes in another order.
        OSError: the file cannot be read.
    """
    where = f"--pretrained {path}, model {name}"
    file, own = read_file(path), model.state_dict()
    weights = without_prefix(file.weights, own.keys())
    classifier = {key: own[key] for key in classifier_keys(name, in_channels)}
    fill(model, weights | classifier, where)  # first without the classifier: another network is not an error of classes
    warn_of_arithmetic(f"--pretrained {path}", name, file.name, weights)
    if class_names is None:
        return
    for key, ours in classifier.items():
        theirs = weights.get(key, ours)
        if theirs.dim() == ours.dim() and len(theirs) != len(ours):
            raise ValueError(
                f"--pretrained {path}: its network has {len(theirs)} classes, the data have {len(ours)} ({key}); "
                "--new-classifier starts with a new classifier"
            )
    fill(model, weights, where)
    if file.interface is not None:
        _compare_classes(file.interface.outputs, class_names, f"--pretrained {path}")


def _compare_classes(theirs: Sequence[str], ours: Sequence[str], where: str) -> None:
    """Raise ValueError for the same classes in another order, and warn of other classes. See also `class_change`."""
    if len(theirs) != len(ours):
        raise ValueError(f"{where}: {len(ours)} scores, but {len(theirs)} names for them")
    change = class_change(theirs, ours, where)
    if change is not None and set(theirs) == set(ours):
        raise ValueError(f"{where}: {change}: the order of the classes must match, or take --new-classifier")
    if change is not None:
        warn(f"{where}: {change}, and its classifier is kept; --new-classifier starts with a new one")


def classifier_keys(name: str, in_channels: int) -> list[str]:
    """Return the keys of a network's state dict whose shape depends on the number of classes."""
    two, three = (state_shapes(name, number, in_channels) for number in (2, 3))
    return [key for key in two if two[key] != three[key]]
