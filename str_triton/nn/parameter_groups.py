"""Parameter groups for an optimizer: weights, thresholds, spectra, and normalization."""

from torch import nn

from str_triton.nn.holder import ThresholdHolder
from str_triton.nn.kinds import NORMS
from str_triton.nn.low_rank import LowRankWeight


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    threshold_weight_decay: float | None = None,
    norm_weight_decay: float = 0.0,
    spectrum_weight_decay: float | None = None,
) -> list[dict]:
    """Return the trainable parameters of a model in groups for a torch optimizer, each parameter once.

    Raw thresholds that a controller sets and the optimizer does not train are left out. Build the controller, if there
    is one, before you call this function.

    Module type, parameter identity and dimensions decide the group of a parameter. Names play no part.

    Args:
        weight_decay: for the weights, and for every parameter that is in no other group.
        threshold_weight_decay: for the raw thresholds. None: the weights' decay, as in the paper; 0 for thresholds
            that a controller holds.
        norm_weight_decay: for the parameters of normalization layers, and for vectors: biases and the like.
        spectrum_weight_decay: for the spectra m of factored matrices. None: the weights' decay; 0 for matrices whose
            rank a controller sets. The paper reaches a low rank by decay on m and on the raw thresholds, without a
            controller; with Adam such a decay drives the m of a component that has small gradients to 0.

    Returns:
        The non-empty groups {"params", "weight_decay", "name"}, in the order "weights", "thresholds", "spectra",
        "norms". Two groups are named "thresholds" if a controller sets only some of the thresholds.
    """
    special: dict[int, tuple[str, float]] = {}
    held: set[int] = set()
    for module in model.modules():
        if isinstance(module, ThresholdHolder) and module.raw_threshold is not None:
            usual = 0.0 if module.control else weight_decay
            if isinstance(module, LowRankWeight) and module.m is not None:
                decay = usual if spectrum_weight_decay is None else spectrum_weight_decay
                special[id(module.m)] = ("spectra", decay)
            decay = usual if threshold_weight_decay is None else threshold_weight_decay
            special[id(module.raw_threshold)] = ("thresholds", decay)
            if not module.learns_threshold:
                held.add(id(module.raw_threshold))
        elif isinstance(module, NORMS):
            special.update((id(p), ("norms", norm_weight_decay)) for p in module.parameters(recurse=False))
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in held:
            default = ("norms", norm_weight_decay) if parameter.dim() < 2 else ("weights", weight_decay)
            groups.setdefault(special.get(id(parameter), default), []).append(parameter)
    order = ["weights", "thresholds", "spectra", "norms"]
    return [
        {"params": params, "weight_decay": decay, "name": name}
        for (name, decay), params in sorted(groups.items(), key=lambda group: order.index(group[0][0]))
    ]
