"""The papers' formulas, literally, for autograd in float64: what every implementation is measured against."""

import torch
from torch import Tensor


def singular_value_threshold(w: Tensor, alpha: Tensor) -> Tensor:
    """Cai, Candes, Shen 2010, equation 2.2: U diag(relu(sigma - alpha)) V^T.

    Autograd through the SVD divides by differences of singular values: its gradient holds where they are distinct.
    """
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u @ torch.diag_embed(torch.relu(sigma - alpha)) @ vh
