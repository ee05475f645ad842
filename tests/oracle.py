"""The papers' formulas, literally, for autograd in float64: what every implementation is measured against."""

import torch
from torch import Tensor


def threshold(raw: Tensor, g: str) -> Tensor:
    """Return alpha = g(s)."""
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
    """Return the same value, with the same gradient of s, but dS/dx = 1 everywhere."""
    return soft_threshold(x.detach(), raw, g) + x - x.detach()


def singular_value_threshold(w: Tensor, alpha: Tensor) -> Tensor:
    """Cai, Candes, Shen 2010, equation 2.2: U diag(relu(sigma - alpha)) V^T.

    Autograd through the SVD divides by differences of singular values: its gradient holds where they are distinct.
    """
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u @ torch.diag_embed(torch.relu(sigma - alpha)) @ vh


def time_loop(
    step, gates_x: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply step(x, *states) -> states to each sequence alone. Return the first state [T, B, H] and the last ones."""
    time, batch, _ = gates_x.shape
    outputs, finals = [], []
    for index in range(batch):
        length = time if lengths is None else int(lengths[index])
        state = tuple(tensor[index] for tensor in states)
        rows = [torch.zeros_like(state[0])] * time
        for t in reversed(range(length)) if reverse else range(length):
            state = step(gates_x[t, index], *state)
            rows[t] = state[0]
        outputs.append(torch.stack(rows))
        finals.append(state)
    return torch.stack(outputs, 1), tuple(torch.stack(final) for final in zip(*finals, strict=True))


def low_rank_gru(gates_x, u, m, v, bias, h0, lengths=None, *, reverse=False) -> tuple[Tensor, Tensor]:
    """Cho et al. 2014 as torch.nn.GRU has it, R = u diag(m) v^T (Kusupati et al. 2020, section 3.3)."""
    recurrent = u @ torch.diag(m) @ v.T

    def step(x: Tensor, h: Tensor) -> tuple[Tensor]:
        x_r, x_z, x_n = x.chunk(3)
        h_r, h_z, h_n = (recurrent @ h + (0 if bias is None else bias)).chunk(3)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return ((1 - z) * n + z * h,)

    outputs, (h,) = time_loop(step, gates_x, (h0,), lengths, reverse)
    return outputs, h


def low_rank_mgu(gates_x, u, m, v, bias, h0, lengths=None, *, reverse=False) -> tuple[Tensor, Tensor]:
    """Zhou et al. 2016 with the gate after the product, R = u diag(m) v^T."""
    recurrent = u @ torch.diag(m) @ v.T

    def step(x: Tensor, h: Tensor) -> tuple[Tensor]:
        x_f, x_n = x.chunk(2)
        h_f, h_n = (recurrent @ h + (0 if bias is None else bias)).chunk(2)
        f = torch.sigmoid(x_f + h_f)
        return ((1 - f) * h + f * torch.tanh(x_n + f * h_n),)

    outputs, (h,) = time_loop(step, gates_x, (h0,), lengths, reverse)
    return outputs, h


def low_rank_lstm(gates_x, u, m, v, bias, h0, c0, lengths=None, *, reverse=False) -> tuple[Tensor, tuple]:
    """Hochreiter, Schmidhuber 1997 with the forget gate, as torch.nn.LSTM has it, R = u diag(m) v^T."""
    recurrent = u @ torch.diag(m) @ v.T

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (x + recurrent @ h + (0 if bias is None else bias)).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    return time_loop(step, gates_x, (h0, c0), lengths, reverse)


def low_rank_fastgrnn(
    gates_x, u, m, v, bias_gate, bias_update, zeta, nu, h0, lengths=None, *, reverse=False
) -> tuple[Tensor, Tensor]:
    """Kusupati et al. 2018, equations 3 to 5 (FastGRNN), R = u diag(m) v^T."""
    recurrent = u @ torch.diag(m) @ v.T

    def step(x: Tensor, h: Tensor) -> tuple[Tensor]:
        z = torch.sigmoid(x + recurrent @ h + (0 if bias_gate is None else bias_gate))
        candidate = torch.tanh(x + recurrent @ h + (0 if bias_update is None else bias_update))
        return ((torch.sigmoid(zeta) * (1 - z) + torch.sigmoid(nu)) * candidate + z * h,)

    outputs, (h,) = time_loop(step, gates_x, (h0,), lengths, reverse)
    return outputs, h
