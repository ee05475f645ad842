"""The kinds of modules whose weights `sparsify` knows, and of those whose parameters are no weights."""

import torch
from torch import nn

from str_triton.ops.shards import is_sharded

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: batch and instance norms
ONE_WEIGHT = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag),
)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
ATTENTION_BIASES = ("bias_k", "bias_v")  # of shape [1, 1, features]


def weight_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes that hold the weights of a module of a known kind, in order; () for another module."""
    if isinstance(module, ONE_WEIGHT) or _is_transformers_conv1d(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return tuple(name for name in ATTENTION_WEIGHTS if module._parameters.get(name, module) is not None)
    if isinstance(module, nn.RNNBase):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    return ()


def _is_transformers_conv1d(module: nn.Module) -> bool:
    # By name, because this library does not import transformers.
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def is_bias(module: nn.Module, attribute: str) -> bool:
    """Return whether a parameter is added to activations instead of multiplied with them."""
    return attribute == "bias" or (isinstance(module, nn.MultiheadAttention) and attribute in ATTENTION_BIASES)


def weight_refusal(module: nn.Module, attribute: str) -> str | None:
    """Return why no threshold can stand in front of a weight, whichever way; None if one can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled its module"
    weight = module._parameters.get(attribute)
    if weight is None:
        return f"its {attribute} is no plain Parameter (parametrized, as by weight_norm, pruned, or tied by hand)"
    if nn.parameter.is_lazy(weight):
        return f"its {attribute} is lazy and has no shape yet: call the model once before sparsify"
    if is_sharded(weight):
        return f"its {attribute} is spread over processes: call sparsify before fully_shard or parallelize_module"
    if not weight.is_floating_point():
        return f"its {attribute} is {weight.dtype}, not floating-point"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return "sparse=True gives sparse gradients, which a threshold cannot use"
    return None
