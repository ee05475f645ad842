"""Recognition of recurrent classifiers: a module's recurrent layer, its linear layer, and the pooling between them."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from str_triton.deploy.projections import without_projections
from str_triton.nn.recurrent import LowRankGRU, LowRankLSTM, LowRankRNN

POOLINGS = ("last", "mean")
BATCH, STEPS = 2, 20  # the random sequences that show which function the module computes
TOLERANCE = 1e-4  # relative to the largest score where that is above 1


@dataclass(frozen=True, eq=False)
class RecurrentClassifier:
    """A recurrent layer and the linear layer that scores its last states or the mean of its outputs.

    Attributes:
        rnn: the compact recurrent layer, float32, on the CPU. Dense layers of torch are LowRank layers with dense
            matrices here, and projections (proj_size) are factors of its matrices and part of `weight`.
        weight: float32 [classes, hidden_size * directions]. bias: float32 [classes].
        pooling: "last" or "mean".
    """

    rnn: LowRankRNN
    weight: Tensor
    bias: Tensor
    pooling: str

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module) -> "RecurrentClassifier":
        """Take a classifier apart. The module itself does not change.

        The module's scores of random sequences show the pooling, and that the module computes nothing else.

        Raises:
            ValueError: the module has other layers with parameters, or computes another function.
        """
        name = type(module).__name__
        module = copy.deepcopy(module).to("cpu", torch.float32).eval()
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise ValueError(f"{name} has weights that are NaN or infinite")
        dense, linear = _parts(module, name)
        weight = linear.weight.detach()
        if isinstance(dense, nn.LSTM) and dense.proj_size:
            dense, projection = without_projections(dense)
            weight = weight @ projection
        rnn = _compact(dense)
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        candidates = [cls(rnn, weight, bias.detach(), pooling) for pooling in POOLINGS]
        x = torch.randn(STEPS, BATCH, rnn.input_size, generator=torch.Generator().manual_seed(0))
        scores = _called(module, x.transpose(0, 1) if rnn.batch_first else x, name)
        expected = [candidate.scores(x) for candidate in candidates]
        if scores.shape != expected[0].shape:
            raise ValueError(
                f"{name} returns scores of shape {list(scores.shape)} for {BATCH} sequences; a classifier returns "
                f"{list(expected[0].shape)}"
            )
        deviations = [float((scores - own).abs().max() / own.abs().max().clamp(min=1)) for own in expected]
        best = min(range(len(POOLINGS)), key=deviations.__getitem__)
        if not deviations[best] <= TOLERANCE:
            raise ValueError(
                f"{name}'s scores are neither those of the last states nor those of the mean output of its recurrent "
                f"layer: they differ by {deviations[best]:.2g}. Export a module that only pools and scores"
            )
        return candidates[best]

    def scores(self, x: Tensor) -> Tensor:
        """Return the scores [B, classes] of sequences [T, B, input_size]."""
        outputs, state = self.rnn(x.transpose(0, 1) if self.rnn.batch_first else x)
        if self.pooling == "mean":
            pooled = outputs.mean(1 if self.rnn.batch_first else 0)
        else:
            h = state[0] if isinstance(state, tuple) else state
            pooled = h[-1 - self.rnn.bidirectional :].transpose(0, 1).flatten(1)
        return F.linear(pooled, self.weight, self.bias)


def _parts(module: nn.Module, name: str) -> tuple[LowRankRNN | nn.RNNBase, nn.Linear]:
    """Return the module's recurrent layer and its linear layer; raise ValueError where there is anything else."""
    modules = dict(module.named_modules())
    layers = {path: own for path, own in modules.items() if isinstance(own, LowRankRNN | nn.RNNBase)}
    if len(layers) != 1:
        raise ValueError(f"{name} has {len(layers)} recurrent layers; a recurrent classifier has one")
    ((path, layer),) = layers.items()
    if not isinstance(layer, LowRankRNN | nn.GRU | nn.LSTM):
        raise ValueError(
            f"{name}: {path} is an nn.{type(layer).__name__}; nn.GRU, nn.LSTM and this package's layers are known"
        )
    inside = set(layer.modules())
    others = {at: own for at, own in modules.items() if own not in inside and any(True for _ in own.parameters(False))}
    width = (getattr(layer, "proj_size", 0) or layer.hidden_size) * (1 + layer.bidirectional)
    linears = [own for own in others.values() if isinstance(own, nn.Linear) and own.in_features == width]
    if len(others) != 1 or len(linears) != 1:
        found = ", ".join(f"{at or name} ({type(own).__name__})" for at, own in others.items()) or "nothing"
        raise ValueError(f"{name} has {found} beside {path}; a recurrent classifier has one Linear of {width} inputs")
    return layer, linears[0]


def _compact(layer: LowRankRNN | nn.RNNBase) -> LowRankRNN:
    if isinstance(layer, LowRankRNN):
        return layer.compact()
    return (LowRankGRU if isinstance(layer, nn.GRU) else LowRankLSTM).from_dense(layer, factorize="none")


def _called(module: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return the module's scores; a module that does not take sequences is a ValueError."""
    try:
        scores = module(x)
    except Exception as error:
        raise ValueError(f"{name} does not take sequences {list(x.shape)}: {error}") from error
    scores = scores[0] if isinstance(scores, tuple) else scores
    if not isinstance(scores, Tensor):
        raise ValueError(f"{name} returns {type(scores).__name__}; a classifier returns a tensor of scores")
    return scores
