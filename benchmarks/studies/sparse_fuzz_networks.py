"""Random networks for benchmarks/studies/sparse_fuzz.py, drawn from a seed."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.sparse_fuzz_kinds import KINDS, WEIGHTS, Do, Draw, changed_by
from benchmarks.studies.sparse_fuzz_recurrent import RecurrentNetwork

RECURRENT = 10**6  # seeds from here on are recurrent networks


class ImageNetwork(nn.Module):
    """[B, 3, H, W], perhaps with a table of numbers and a class -> a tensor, a tuple or a dict."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        weights = [WEIGHTS.get(kind, 1) for kind in KINDS]
        self.kinds = draw.choices(list(KINDS), weights, k=draw.randint(2, 8))
        self.steps, channels = nn.ModuleList(), 3
        for kind in self.kinds:
            made, channels = KINDS[kind](channels, draw)
            self.steps.append(made)
        self.head = nn.Linear(channels, 5) if draw.random() < 0.6 else None
        self.inputs = draw.choice(("image", "image", "image", "pair", "dict", "class"))
        self.classes = nn.Embedding(4, 5)
        self.result = draw.choice(("tensor", "tuple", "dict"))
        self.scale = draw.choice((1.0, 1.0, 1.0, 100.0, 1e4))  # of the images: e^x of some activations overflows

    def forward(self, given: Any, label: Tensor | None = None) -> Any:
        x = given["image"] * given["scale"] if isinstance(given, dict) else given
        for step in self.steps:
            x = step(x)
        y = x.mean((2, 3)) if self.head is None else self.head(x.mean((2, 3)))
        if label is not None:
            y = y.sum(1, keepdim=True) + (label if label.is_floating_point() else self.classes(label))
        return {"tensor": y, "tuple": (y, None, x), "dict": {"scores": y, "parts": [x, y.argmax(1) * 0]}}[self.result]

    def example(self, batch: int, height: int, width: int) -> tuple[Any, ...]:
        """Return arguments with so many images of this size."""
        x = self.scale * torch.randn(batch, 3, height, width)
        match self.inputs:
            case "pair":
                return x, torch.randn(batch, 5)
            case "dict":
                return ({"image": x, "scale": torch.rand(batch, 1, 1, 1) + 0.5},)
            case "class":
                return x, torch.randint(4, (batch,))
        return (x,)


class TokenNetwork(nn.Module):
    """Token ids [B, T] and perhaps a mask -> logits: embeddings, attention, linear layers in many spellings."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        width = draw.choice((8, 12, 16))
        self.kinds = ["tokens"]
        self.tokens, self.positions = nn.Embedding(11, width), nn.Parameter(torch.randn(64, width))
        self.blocks = nn.ModuleList(self._block(width, draw) for _ in range(draw.randint(1, 3)))
        self.masked, self.tied = draw.random() < 0.5, draw.random() < 0.4
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11, bias=False)

    def _block(self, width: int, draw: Draw) -> nn.Module:
        kinds: dict[str, Callable[[], nn.Module]] = {
            "mlp": lambda: Do(lambda x, a, b: x + b(F.gelu(a(x))), nn.Linear(width, 24), nn.Linear(24, width)),
            "gated": lambda: Do(lambda x, a, b: b(F.glu(a(x), -1)) + x, nn.Linear(width, 16), nn.Linear(8, width)),
            "product": lambda: Do(lambda x, a: torch.relu(x @ a.weight) + x, nn.Linear(width, width, bias=False)),
            "addmm": lambda: Do(
                lambda x, a: torch.addmm(a.bias, x.flatten(0, 1), a.weight).view(x.shape), nn.Linear(width, width)
            ),
            "conv1d": lambda: Do(
                lambda x, a: x + a(x.transpose(1, 2)).transpose(1, 2), nn.Conv1d(width, width, 3, padding=1)
            ),
            "norm": lambda: Do(
                lambda x, a, b: b(a(x).flatten(0, 1)).view(x.shape).clamp(-1, 1),
                nn.Linear(width, width), nn.BatchNorm1d(width),
            ),
            "multi head": lambda: Do(lambda x, a: x + a(x, x, x, need_weights=False)[0], _heads(width)),
            "layer": lambda: nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, norm_first=draw.random() < 0.5),
            "gru": lambda: Do(lambda x, a: x + a(x)[0], nn.GRU(width, width, batch_first=True)),
            "in place": lambda: Do(changed_by(lambda y: y[:, 0].add_(1.0)), nn.Linear(width, width)),
            "rms": lambda: Do(lambda x, a: a(x * x.square().mean(-1, True).add(1e-5).rsqrt()), nn.Linear(width, width)),
        }  # fmt: skip
        kind = draw.choice(list(kinds))
        self.kinds.append(f"tokens: {kind}")
        return kinds[kind]()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None], 0.0)
        x = self.norm(x)
        return {"logits": x @ self.tokens.weight.t() if self.tied else self.head(x), "last": x[:, -1]}

    def example(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """Return ids, `height` of them in a sequence."""
        ids = torch.randint(11, (batch, height))
        return (ids, torch.rand(batch, height) < 0.8) if self.masked else (ids,)


def _heads(width: int) -> nn.Module:
    return nn.MultiheadAttention(width, 2, batch_first=True)


class Case(NamedTuple):
    """A network and the sizes of its example."""

    model: ImageNetwork | TokenNetwork | RecurrentNetwork
    sizes: tuple[int, int, int]


def case(seed: int) -> Case:
    """Return the network of a seed, with random zeros, in eval mode."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model: ImageNetwork | TokenNetwork | RecurrentNetwork
    if seed >= RECURRENT:
        model = RecurrentNetwork(draw)
    else:
        model = ImageNetwork(draw) if draw.random() < 0.75 else TokenNetwork(draw)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Conv1d):
            _thin(module.weight.data, draw)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    return Case(model.eval(), (draw.randint(1, 3), draw.randint(14, 26), draw.randint(14, 26)))


def redraw(model: nn.Module, draw: random.Random) -> None:
    """Draw the weights of all convolutions and linear layers again, some of them zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Conv1d):
            _thin(module.weight.data.normal_(0, max(module.weight[0].numel(), 1) ** -0.5), draw)


def _thin(weight: Tensor, draw: random.Random) -> None:
    """Make a random share of a weight zero, in place."""
    weight *= torch.rand_like(weight) < draw.choice((0.0, 0.05, 0.3, 0.3, 1.0))
