"""The choice of a controller by its target, for all callbacks."""

from typing import Any

from torch import nn

from str_triton import RankController, RankTarget, SparsityController, Target


def controller_for(
    model: nn.Module, target: Target | RankTarget, options: dict[str, Any]
) -> SparsityController | RankController:
    """Return a controller of the target's kind for the model, with the options of its constructor."""
    if isinstance(target, Target):
        return SparsityController(model, target, **options)
    if isinstance(target, RankTarget):
        return RankController(model, target, **options)
    raise TypeError(f"target must be a Target or a RankTarget, got {type(target).__name__}")
