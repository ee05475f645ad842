"""nn.LSTM with projections (proj_size) as an LSTM without them, which the exports know.

The projected state is P h with h = o tanh(c), and only products with it are used. A recurrent matrix W [4 H, P] applied
to it is therefore the matrix W P applied to h: a matrix in two factors, as `LowRankLSTM` has. The outputs are projected
after the last step.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton.nn.recurrent import LowRankLSTM


@torch.no_grad()
def without_projections(layer: nn.LSTM) -> tuple[LowRankLSTM, Tensor]:
    """Return a layer with the same cell states, and the matrix that projects its outputs to those of ``layer``."""
    first = next(layer.parameters())
    directions = ["", "_reverse"] if layer.bidirectional else [""]
    projections = [
        torch.block_diag(*(getattr(layer, f"weight_hr_l{number}{end}") for end in directions))
        for number in range(layer.num_layers)
    ]
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for number in range(layer.num_layers):
        for end in directions:
            name = f"_l{number}{end}"
            factors["weight_hh" + name] = getattr(layer, "weight_hh" + name), getattr(layer, "weight_hr" + name).t()
            if number > 0:
                factors["weight_ih" + name] = getattr(layer, "weight_ih" + name), projections[number - 1].t()
    plain = LowRankLSTM(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        ranks={name: u.shape[1] for name, (u, _) in factors.items()},
        device=first.device,
        dtype=first.dtype,
    ).train(layer.training)
    state = {
        f"{name}.{factor}": value for name, pair in factors.items() for factor, value in zip("uv", pair, strict=True)
    }
    given = layer.state_dict()
    plain.load_state_dict({name: given.get(name, state.get(name)) for name in plain.state_dict()})
    return plain, projections[-1].clone()


class ProjectedLSTM(nn.Module):
    """A module with the inputs and outputs of an nn.LSTM with projections, by `without_projections`."""

    projection: Tensor
    each: Tensor
    inverse: Tensor

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.rnn, projection = without_projections(layer)
        own = [getattr(layer, name).detach() for name in layer.state_dict() if name.startswith("weight_hr")]
        self.register_buffer("projection", projection)
        self.register_buffer("each", torch.stack(own).transpose(1, 2))
        self.register_buffer("inverse", torch.linalg.pinv(torch.stack(own)).transpose(1, 2))

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return what nn.LSTM returns. An initial state h0 becomes a state whose projection is h0."""
        states = None if hx is None else (_by_layer(hx[0], self.inverse), hx[1])
        outputs, (h, c) = self.rnn(x, states)
        return F.linear(outputs, self.projection), (_by_layer(h, self.each), c)


def _by_layer(states: Tensor, matrices: Tensor) -> Tensor:
    """Multiply the state of each layer and direction, [B, size] or [size], with its matrix."""
    if states.dim() == 2:
        return torch.bmm(states.unsqueeze(1), matrices).squeeze(1)
    return torch.bmm(states, matrices)


def replace_projections(module: nn.Module) -> nn.Module:
    """Return a copy of a module with a `ProjectedLSTM` for every nn.LSTM with projections; itself if it has none."""
    has_projections = any(type(own) is nn.LSTM and own.proj_size for own in module.modules())
    return _replaced(copy.deepcopy(module)) if has_projections else module


def _replaced(module: nn.Module) -> nn.Module:
    if type(module) is nn.LSTM and module.proj_size:
        return ProjectedLSTM(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child))
    return module
