"""The form of a threshold in a state dict.

A thresholded weight has the plain model's key and one more dimension in front, of size 1, so that no loader can take it
for a plain weight. A small uint8 tensor beside its raw threshold holds a text that names g and the gradient.
"""

import torch
from torch import Tensor

from str_triton.nn.shards import sharded_like
from str_triton.ops.thresholds import THRESHOLD_FUNCTIONS

RAW = "raw_threshold"
OPTIONS = "threshold_options"
SHARED = ",shared=1"
LENGTH = 64  # bytes of an options text; the same for all options, so that all states of a model have the same shapes


def options_tensor(g: str, gradient: str, device: torch.device, *, is_shared: bool = False) -> Tensor:
    """Return the options of a threshold as a uint8 tensor that holds a text.

    `is_shared` says that an earlier module of the model has the same threshold.
    """
    text = f"g={g},gradient={gradient}{SHARED if is_shared else ''}".ljust(LENGTH).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu" if device.type == "meta" else device)


def saved_g(name: str, options: Tensor) -> str:
    """Return the g in an options tensor. Raises ValueError, which names the tensor's key, for other content."""
    if options.dtype == torch.uint8 and options.dim() == 1 and options.numel() <= LENGTH and not options.is_meta:
        text = bytes(options.tolist()).decode("ascii", "replace").strip()
        g = dict(part.partition("=")[::2] for part in text.split(",")).get("g")
        if g in THRESHOLD_FUNCTIONS:
            return g
    raise ValueError(f"{name!r} does not name a g that this version knows: the file is damaged or of a later version")


def says_shared(options: Tensor) -> bool:
    """Return whether an options tensor says that its threshold is shared with an earlier module."""
    return SHARED.encode() in bytes(options.tolist())


def saved_options(state: dict[str, Tensor], prefix: str) -> str | None:
    """Take the options of the threshold at `prefix` out of a state dict and return its g; None without a threshold.

    Raises ValueError for a raw threshold without options.
    """
    options = state.pop(prefix + OPTIONS, None)
    if options is not None:
        return saved_g(prefix + OPTIONS, options)
    if prefix + RAW in state:
        raise ValueError(
            f"{prefix + RAW!r} is a raw threshold, and nothing says which g applies it: save the state dict again, "
            "from the sparsified model with this version of str_triton"
        )
    return None


def marked(weight: Tensor) -> Tensor:
    """Return the view of a thresholded weight for a state dict."""
    return weight.unsqueeze(0)


def unmark(state: dict[str, Tensor], key: str, weight: Tensor) -> bool:
    """Let a state dict hold the plain shape of `weight` under `key`; return whether it held a thresholded weight.

    A saved tensor for a sharded weight, whole or with other shards, gets the weight's shards.
    """
    saved = state.get(key)
    if not isinstance(saved, Tensor):
        return False
    is_marked = saved.dim() == weight.dim() + 1 and saved.shape[0] == 1
    value = saved[0] if is_marked else saved
    state[key] = sharded_like(value, weight) if value.shape == weight.shape else value
    return is_marked


def computed_weight(name: str) -> ValueError:
    """Return the error for a thresholded weight that other code computes since `sparsify`."""
    return ValueError(
        f"the weight of {name!r} is no plain Parameter any more (weight_norm, spectral_norm, pruning, tied by hand): "
        "remove what computes it (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
    )
