"""The papers' formulas, literally, for autograd in float64: what every implementation is measured against."""

import torch
from torch import Tensor


def threshold(raw: Tensor, g: str) -> Tensor:
    """alpha = g(s)."""
    if g == "sigmoid":
        return 1 / (1 + torch.exp(-raw))
    if g == "exp":
        return torch.exp(raw)
    if g == "softplus":
        return torch.log(1 + torch.exp(raw))
    assert g == "identity"
    return torch.relu(raw)


def soft_threshold(x: Tensor, raw: Tensor, g: str = "sigmoid") -> Tensor:
    """Kusupati et al. 2020, equation 3: sign(x) relu(|x| - g(s)); autograd gives the paper's masked gradient."""
    if raw.numel() == 1:
        raw = raw.reshape(())
    return torch.sign(x) * torch.relu(x.abs() - threshold(raw, g))


def soft_threshold_straight_through(x: Tensor, raw: Tensor, g: str = "sigmoid") -> Tensor:
    """The same value and the same gradient of s, but dS/dx = 1 everywhere."""
    return soft_threshold(x.detach(), raw, g) + x - x.detach()


def singular_value_threshold(w: Tensor, alpha: Tensor) -> Tensor:
    """Cai, Candes, Shen 2010, equation 2.2: U diag(relu(sigma - alpha)) V^T.

    Autograd through the SVD divides by differences of singular values: its gradient holds where they are distinct.
    """
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u @ torch.diag_embed(torch.relu(sigma - alpha)) @ vh
