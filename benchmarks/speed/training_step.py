"""The cost of STR in training on the CPU: a step of ResNet-50, dense, with STR, and with the literal formula.

    python -m benchmarks.speed.training_step [--rounds 9] [--batch-size 32] [--image-size 64] [--threads 2]

A step is forward, backward and SGD with momentum. The networks take turns. The controller solves only at intervals, so
its solves are timed separately, and their share is added to the ratio of the network with a controller. On a GPU:
benchmarks/gpu.
"""

import argparse
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import alternating, median_ratio, write
from str_triton import SparsityController, Target, parameter_groups, sparsify
from str_triton.cnn.resnet import resnet50


class LiteralConv2d(nn.Conv2d):
    """A convolution with the paper's formula as it is written, differentiated by autograd."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.raw_threshold = nn.Parameter(torch.tensor(-9.0))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sign(self.weight) * torch.relu(torch.abs(self.weight) - torch.sigmoid(self.raw_threshold))
        return self._conv_forward(x, weight, self.bias)


def literal(model: nn.Module) -> nn.Module:
    """Replace every convolution by one with the literal formula, with the same Parameters."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d:
                layer = LiteralConv2d(
                    child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, bias=False
                )
                layer.weight = child.weight
                setattr(module, name, layer)
    return model


class Step:
    """A training step of a network that can be called repeatedly.

    Args:
        controlled: make a controller, which the step does not call.
        autocast: run the forward pass in bfloat16.
        backend: compile the network with this backend of torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        image_size: int,
        controlled: bool = False,
        device: str = "cpu",
        autocast: bool = False,
        backend: str | None = None,
    ) -> None:
        model = model.to(device, memory_format=torch.channels_last)
        self.controller = SparsityController(model, Target(sparsity=0.9)) if controlled else None
        self.optimizer = torch.optim.SGD(parameter_groups(model, 3e-5), lr=1e-3, momentum=0.875)
        self.model = model if backend is None else torch.compile(model, backend=backend)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=autocast)
        images = torch.randn(batch_size, 3, image_size, image_size, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch_size,), device=device)

    def __call__(self) -> None:
        with self.autocast:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = (options.batch_size, options.image_size)
    torch.manual_seed(0)
    steps = {
        "dense": Step(resnet50(), *size),
        "str exact": Step(sparsify(resnet50()), *size, controlled=True),
        "str straight-through": Step(sparsify(resnet50(), gradient="straight_through"), *size),
        "str masked": Step(sparsify(resnet50(), gradient="masked"), *size),
        "literal formula": Step(literal(resnet50()), *size),
    }
    seconds = alternating(steps, options.rounds)
    controller = steps["str exact"].controller
    solve, dense = median(alternating({"solve": controller.solve}, 5)["solve"]), median(seconds["dense"])
    ratios = {name: median_ratio(seconds, name, "dense") for name in steps}
    ratios["str exact"] += solve / controller.interval / dense
    for name, ratio in ratios.items():
        print(f"{name:22s} {1e3 * median(seconds[name]):9.1f} ms   {ratio:.3f} x dense")
    print(f"{'a solve':22s} {1e3 * solve:9.1f} ms, every {controller.interval} steps")
    write(
        "training_step_cpu",
        {
            "network": "ResNet-50",
            "batch_size": options.batch_size,
            "image_size": options.image_size,
            "rounds": options.rounds,
            "seconds": {name: median(values) for name, values in seconds.items()},
            "ratio_to_dense": ratios,
            "solve_seconds": solve,
            "solve_interval": controller.interval,
            "solve_share_of_dense_step": solve / controller.interval / dense,
        },
    )


if __name__ == "__main__":
    main()
