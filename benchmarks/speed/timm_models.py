"""Trial with timm: its networks to 90 % by one call and a controller, its averages (ModelEma, V2, V3), and densify.

    pip install timm; python -m benchmarks.speed.timm_models [NAME ...]

Nothing is downloaded. Where torchvision cannot be imported, an empty stand-in is enough for timm. Ends with an
AssertionError where something does not hold.
"""

import importlib.machinery
import importlib.util
import sys
import types
import warnings

import torch
from torch import Tensor, nn

from str_triton import SparsityController, Target, count, densify, parameter_groups, sparsify
from str_triton.nn import matrices

NAMES = ("resnet50", "mobilenetv3_large_100", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224")
STEPS = 4


class StandIn(types.ModuleType):
    """A package that has every name: a class that is never used."""

    __path__: tuple = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {mode: mode for mode in ("BICUBIC", "BILINEAR", "NEAREST", "HAMMING", "LANCZOS", "BOX")})


class StandIns(importlib.machinery.PathFinder):
    """Finds torchvision and everything below it."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, cls) if name.partition(".")[0] == "torchvision" else None

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        pass


if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.append(StandIns)

import timm  # noqa: E402
import timm.utils  # noqa: E402


def zeros(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Return the zeros among the covered weights, and how many these are."""
    budget = count(model, image)
    return budget.params - budget.nonzeros, budget.params


def trial(name: str) -> None:
    torch.manual_seed(0)
    size = 224 if name.startswith("vit") else 64
    image, labels = torch.randn(1, 3, size, size), torch.tensor([0, 1])
    model = timm.create_model(name, num_classes=10)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    options = {"exclude": ["pos_embed", "cls_token"]} if name.startswith("vit") else {}
    sparsify(model, **options)
    left = [matrix.name for matrix in matrices(model) if not (matrix.covered or matrix.excluded)]
    controller = SparsityController(model, Target(sparsity=0.9), interval=2)
    averages = [timm.utils.ModelEma(model, 0.5), timm.utils.ModelEmaV2(model, 0.5), timm.utils.ModelEmaV3(model, 0.5)]
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=0.01, momentum=0.9)
    for step in range(STEPS):
        images = torch.randn(2, 3, size, size)
        nn.functional.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for average in averages:
            average.update(model)
        controller.step((step + 1) / (STEPS + 1))  # ends before the target
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = []
    for average in averages:
        module = average.ema if isinstance(average, timm.utils.ModelEma) else average.module
        with controller.exact(module):
            found.append(zeros(module, image))
        controller.finish(module)
        found.append(zeros(module, image))
        found.append(zeros(densify(module), image))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    controller.finish()
    found.append(zeros(model, image))
    with torch.no_grad():
        expected = model.eval().requires_grad_(False)(image)
        densify(model)
        assert torch.equal(model(image), expected)
    found.append(zeros(model, image))
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(zero == round(0.9 * total) for zero, total in found), found
    print(f"{name}: {found[0][0]:,} of {found[0][1]:,} weights are zero, not covered: {left or 'none'}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for each in sys.argv[1:] or NAMES:
        trial(each)
