"""Parts of random networks for benchmarks/studies/sparse_fuzz.py: what people write in a forward."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Draw = random.Random


class Do(nn.Module):
    """A function as a layer, with the layers that it uses."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


class Counter(nn.Module):
    """A buffer that every call changes: in place, replaced by another tensor, or a running mean."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "in place":
                self.calls += 1
            case "replaced":
                self.calls = self.calls + 1
            case "mean":
                self.calls.mul_(0.5).add_(x.mean().nan_to_num() * 0.5)  # of no images
        return x + self.calls * 0.1


# ---- layers -------------------------------------------------------------------------------------------------------


def convolution(c: int, draw: Draw) -> tuple[nn.Module, int]:
    out = draw.choice((4, 6, 8, 12, 16))
    groups = draw.choice([g for g in (1, 1, 1, 2, 4, c) if c % g == 0 and out % g == 0] or [1])
    out = draw.choice((out, out, groups * draw.choice((1, 2))))
    kernel = draw.choice((1, 1, 2, 3, 3, 5)), draw.choice((1, 1, 2, 3, 3))
    dilation, stride = ((draw.choice(of), draw.choice(of)) for of in ((1, 1, 1, 2), (1, 1, 1, 2, 3)))
    if draw.random() < 0.7:  # As most networks have them.
        kernel, dilation, stride = (pair[:1] * 2 for pair in (kernel, dilation, stride))
    mode = draw.choice(("zeros", "zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
    padding: Any = draw.randint(0, 2), draw.randint(0, 2)
    if stride == (1, 1) and mode == "zeros" and draw.random() < 0.3:
        padding = draw.choice(("same", "valid"))
    bias = draw.random() < 0.5
    return nn.Conv2d(c, out, kernel, stride, padding, dilation, groups, bias, mode), out


def transposed(c: int, draw: Draw) -> tuple[nn.Module, int]:
    return nn.ConvTranspose2d(c, 6, draw.choice((1, 2, 3)), draw.choice((1, 2)), bias=draw.random() < 0.5), 6


def norm(c: int, draw: Draw) -> tuple[nn.Module, int]:
    made = draw.choice(
        (
            lambda: nn.BatchNorm2d(c),
            lambda: nn.BatchNorm2d(c),
            lambda: nn.BatchNorm2d(c, affine=False),
            lambda: nn.BatchNorm2d(c, track_running_stats=False),
            lambda: nn.GroupNorm(2 if c % 2 == 0 else 1, c),
            lambda: nn.InstanceNorm2d(c, affine=True),
            lambda: Do(lambda x, inner: inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.LayerNorm(c)),
            lambda: Do(lambda x: F.normalize(x, dim=1)),
        )
    )
    return made(), c


def same(c: int, draw: Draw, kernel: int | None = None) -> nn.Module:
    """Return a convolution that keeps the shape, with or without a norm."""
    conv = nn.Conv2d(c, c, kernel or draw.choice((1, 3)), padding="same", bias=draw.random() < 0.5)
    return nn.Sequential(conv, nn.BatchNorm2d(c)) if draw.random() < 0.5 else conv


RESIDUALS: tuple[Callable[..., Tensor], ...] = (
    lambda x, a, b: F.relu(x + a(x)),
    lambda x, a, b: F.relu6(a(x) + x),
    lambda x, a, b: a(x) + b(x),
    lambda x, a, b: torch.add(x, a(x), alpha=0.5),
    lambda x, a, b: x - a(x),
    lambda x, a, b: a(x) + b(x).mean((2, 3), keepdim=True),
    lambda x, a, b: a(x).add_(x).relu_(),
    lambda x, a, b: a(F.relu(b(x))) + x + 1.0,
    lambda x, a, b: a(b(a(x))) * 0.5 + x,  # one layer twice
    lambda x, a, b: (y := a(x)) + F.relu(y),
)


def residual(c: int, draw: Draw) -> tuple[nn.Module, int]:
    return Do(draw.choice(RESIDUALS), same(c, draw), same(c, draw)), c


def concat(c: int, draw: Draw) -> tuple[nn.Module, int]:
    if c > 24:
        return residual(c, draw)
    how = draw.choice(
        (
            lambda x, a: torch.cat([x, a(x)], 1),
            lambda x, a: torch.stack([x, a(x)], 2).flatten(1, 2),
            lambda x, a: torch.cat(torch.cat([a(x), x], 1).chunk(2, 1)[::-1], 1),
        )
    )
    return Do(how, same(c, draw)), 2 * c


def gate(c: int, draw: Draw) -> tuple[nn.Module, int]:
    """Squeeze and excitation, by convolutions or by linear layers."""
    down, up = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
    pool = draw.choice((lambda x: x.mean((2, 3), keepdim=True), lambda x: F.adaptive_avg_pool2d(x, 1)))
    end = draw.choice((torch.sigmoid, F.hardsigmoid))
    if draw.random() < 0.3:
        linear = nn.Linear(c, c)
        return Do(lambda x, inner: x * end(inner(x.mean((2, 3))))[:, :, None, None], linear), c
    return Do(lambda x, a, b: x * end(b(F.relu(a(pool(x))))), down, up), c


def attention(c: int, draw: Draw) -> tuple[nn.Module, int]:
    """Self-attention over the pixels; at most 64 of them."""
    causal = draw.random() < 0.3

    def attend(x: Tensor, norm: nn.Module, qkv: nn.Module, out: nn.Module) -> Tensor:
        small = F.adaptive_avg_pool2d(x, 4)
        tokens = small.flatten(2).transpose(1, 2)
        q, k, v = qkv(norm(tokens)).chunk(3, -1)
        tokens = tokens + out(F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        return x + tokens.transpose(1, 2).reshape(small.shape).mean((2, 3), keepdim=True)

    return Do(attend, nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)), c


def activation(c: int, draw: Draw) -> tuple[nn.Module, int]:
    functions = (
        F.relu, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, torch.tanh, torch.sigmoid, F.leaky_relu,
        F.elu, F.selu, F.mish, F.softplus, F.softsign, torch.abs, torch.square, nn.PReLU(c),
        lambda x: F.hardtanh(x, -0.5, 0.7), lambda x: x.clamp(-1.0, 2.0), lambda x: x.clamp(max=0.3),
        lambda x: x.clamp(2.0, -1.0), lambda x: x.clamp_min(-0.2), lambda x: F.relu_(x * 1.0),
        lambda x: F.hardtanh_(F.relu(x), 0.1, 0.6), lambda x: F.relu(-F.relu(x)), lambda x: x.clamp(min=x.mean()),
        lambda x: F.softmax(x, 1), lambda x: F.log_softmax(x, 1), lambda x: F.dropout(x, 0.5, False),
    )  # fmt: skip
    found = draw.choice(functions)
    return (found if isinstance(found, nn.Module) else Do(found)), c


def pool(c: int, draw: Draw) -> tuple[nn.Module, int]:
    functions = (
        lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0)), lambda x: F.max_pool2d(F.relu(x), 3, 2, 1),
        lambda x: F.max_pool2d(x, 2, 1, 1, 2), lambda x: F.avg_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), lambda x: F.adaptive_avg_pool2d(x, 3),
        lambda x: F.adaptive_max_pool2d(x, (2, 5)),
    )  # fmt: skip
    chosen = draw.choice(functions)
    return Do(lambda x: x if min(x.shape[2:]) < 5 else chosen(x)), c


# ---- views, changes in place, masks, state ------------------------------------------------------------------------


def changed_by(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor, *layers: nn.Module) -> Tensor:
        y = layers[0](x) if layers else x * 1.0
        change(y)
        return y

    return changed


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "narrow": lambda y: y.narrow(1, 0, 2).add_(1.0),
    "index": lambda y: y.__setitem__((slice(None), slice(None), 0), 2.0),
    "select": lambda y: y.select(1, 1).mul_(3.0),
    "view": lambda y: y.view(-1).mul_(2.0),
    "reshape": lambda y: y.reshape(y.shape[0], -1).add_(1.0),
    "transpose": lambda y: y.transpose(2, 3).mul_(2.0),
    "permute": lambda y: y.permute(0, 2, 3, 1)[..., 0].sub_(1.0),
    "diagonal": lambda y: y.diagonal(dim1=2, dim2=3).fill_(1.5),
    "chunk": lambda y: y.chunk(2, 1)[-1].mul_(0.5),
    "split": lambda y: y.split(1, 1)[0].add_(2.0),
    "unbind": lambda y: y.unbind(1)[1].zero_(),
    "detach": lambda y: y.detach().add_(1.0),
    "data": lambda y: y.flatten(2).clamp_(max=1.0),
    "unflatten": lambda y: y.unflatten(1, (1, -1)).add_(1.0),
    "squeeze": lambda y: y.unsqueeze(0).squeeze(0).neg_(),
    "expand": lambda y: y.expand(2, *y.shape)[0].add_(0.5),
    # All of its rows: torch.export loses the values of those that no window covers.
    "unfold": lambda y: y[:, :, : y.shape[2] // 2 * 2].unfold(2, 2, 2).mul_(1.5),
    "strided": lambda y: y[:, :, ::2, 1:].mul_(1.5),
    "out": lambda y: torch.add(y, 1.0, out=y),
    "copy": lambda y: y[:, :1].copy_(y[:, 1:2]),
    "masked": lambda y: y.masked_fill_(y > 1.0, 1.0),
    "put": lambda y: y.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor(1.0)),
    "where": lambda y: y.copy_(torch.where(y > 0, y, y * 0.1)),
    "view_as_complex": lambda y: torch.view_as_real(torch.complex(y, y)).add_(1.0),
    "earlier view": lambda y: (y.flatten(1), y.relu_())[0].add_(1.0),
}


def change(c: int, draw: Draw) -> tuple[nn.Module, int]:
    found = changed_by(CHANGES[draw.choice(list(CHANGES))])
    return (Do(found, same(c, draw)) if draw.random() < 0.5 else Do(found)), c


def mask(c: int, draw: Draw) -> tuple[nn.Module, int]:
    # Each is continuous: rounding at its edge changes nothing.
    functions = (
        lambda x: x.masked_fill(x > 1.0, 1.0),
        lambda x: torch.where(x > 0, x, 0.2 * x),
        lambda x: x * (torch.arange(x.shape[3], device=x.device) % 2),
        lambda x: x.tril(),
        lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)),
        lambda x: torch.maximum(x, x.flip(3)),
    )
    return Do(draw.choice(functions)), c


def rearrange(c: int, draw: Draw) -> tuple[nn.Module, int]:
    functions = (
        lambda x: x.flip(2), lambda x: x.roll(1, 3), lambda x: x.transpose(2, 3), lambda x: F.pad(x, (1, 0, 2, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), lambda x: x[:, :, 1:, :-1], lambda x: x.contiguous(),
        lambda x: F.channel_shuffle(x, 2) if x.shape[1] % 2 == 0 else x,
        lambda x: F.interpolate(x, scale_factor=2) if max(x.shape[2:]) < 20 else x,
        lambda x: F.interpolate(x, size=(9, 7), mode="bilinear"), lambda x: torch.einsum("bchw->bcwh", x),
        lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.double().mul(0.5).to(x.dtype),
        lambda x: x + torch.ones(x.shape[2:]).cumsum(0).to(x.dtype) * 0.01, lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), 2)[:, ::4], lambda x: x.clone(),
    )  # fmt: skip
    return Do(draw.choice(functions)), c


def state(c: int, draw: Draw) -> tuple[nn.Module, int]:
    return Counter(draw.choice(("in place", "replaced", "mean"))), c


def branch(c: int, draw: Draw) -> tuple[nn.Module, int]:
    """Another way for another size."""
    functions = (
        lambda x, a: a(x) if x.shape[0] > 1 else x * 2,
        lambda x, a: a(x) if x.shape[2] > 8 else x,
        lambda x, a: torch.stack([a(x[i : i + 1])[0] for i in range(x.shape[0])]) if 0 < x.shape[0] < 4 else a(x),
    )
    return Do(draw.choice(functions), same(c, draw)), c


def rows(c: int, draw: Draw) -> tuple[nn.Module, int]:
    """Work on the images that a mask chooses; the mask is exact in every dtype."""

    def chosen(x: Tensor, a: nn.Module) -> Tensor:
        keep = torch.arange(x.shape[0]) % 2 == 0
        return a(x[keep]).mean((0, 2, 3))[None, :, None, None] + x if len(x) else x

    functions = (chosen, lambda x, a: x.index_put((torch.arange(x.shape[0]) % 2 == 0,), a(x)[::2]))
    return Do(draw.choice(functions), same(c, draw)), c


KINDS: dict[str, Callable[[int, Draw], tuple[nn.Module, int]]] = {
    "convolution": convolution, "transposed": transposed, "norm": norm, "activation": activation, "residual": residual,
    "concat": concat, "gate": gate, "attention": attention, "pool": pool, "change": change, "mask": mask,
    "rearrange": rearrange, "state": state, "branch": branch, "rows": rows,
}  # fmt: skip
WEIGHTS = {"convolution": 8, "norm": 3, "activation": 4, "residual": 3, "change": 2, "pool": 2}
