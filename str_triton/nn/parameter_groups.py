"""Parameter groups for an optimizer: weights, thresholds, and normalization."""

from torch import nn

from str_triton.nn.layers import STRLayer

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    threshold_weight_decay: float | None = None,
    norm_weight_decay: float = 0.0,
) -> list[dict]:
    """The trainable parameters of a model in groups for a torch optimizer, each parameter once.

    Membership follows module type, parameter identity and dimensions, never a name.

    Args:
        weight_decay: for the weights, and for every parameter that is in no other group.
        threshold_weight_decay: for the raw thresholds. None: the weights' decay, as in the paper; 0 for thresholds
            that a SparsityController holds.
        norm_weight_decay: for the parameters of normalization layers, and for vectors: biases and the like.

    Returns:
        Up to three non-empty groups {"params", "weight_decay", "name"}, named "weights", "thresholds" and "norms".
    """
    thresholds, norms, controlled = set(), set(), False
    for module in model.modules():
        if isinstance(module, STRLayer):
            thresholds.add(id(module.raw_threshold))
            controlled |= module.controlled
        if isinstance(module, _NORMS):
            norms.update(id(parameter) for parameter in module.parameters(recurse=False))
    if threshold_weight_decay is None:
        threshold_weight_decay = 0.0 if controlled else weight_decay
    groups = {
        "weights": {"params": [], "weight_decay": weight_decay},
        "thresholds": {"params": [], "weight_decay": threshold_weight_decay},
        "norms": {"params": [], "weight_decay": norm_weight_decay},
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            vector = id(parameter) in norms or parameter.dim() < 2
            kind = "thresholds" if id(parameter) in thresholds else "norms" if vector else "weights"
            groups[kind]["params"].append(parameter)
    return [{**group, "name": name} for name, group in groups.items() if group["params"]]
