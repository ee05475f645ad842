"""The count of survivors on the device is exact, to one weight, and the selection gives the CPU's bits."""

from itertools import cycle, product

import torch

from benchmarks.gpu.part import Session
from benchmarks.gpu.solve import tiny
from str_triton import SparsityController, Target, densify, sparsify
from str_triton.budget.cuts import critical_offsets
from str_triton.budget.select import select
from str_triton.cnn.resnet import resnet18
from str_triton.nn import thresholded_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULARITIES = ("layer", "filter", "weight")
SPARSITIES = (0.5, 0.9, 0.99)  # in turn


def run(session: Session) -> None:
    cases = {}
    for (dtype, granularity), sparsity in zip(product(DTYPES, GRANULARITIES), cycle(SPARSITIES), strict=False):
        torch.manual_seed(0)
        model = session.pick(resnet18, tiny)().to(session.device, dtype)
        sparsify(model, granularity=granularity)
        controller = SparsityController(model, Target(sparsity=sparsity), floor=0)
        same_bits = selects_as_the_cpu(controller)
        controller.finish()
        sizes = [weight.dense.numel() for weight in thresholded_weights(model)]
        wanted = sum(sizes) - round(sparsity * sum(sizes))
        kept = sum(int(weight.sparse.count_nonzero()) for weight in thresholded_weights(model))
        plain = sum(int(weight.count_nonzero()) for weight in densify(model).parameters() if weight.dim() > 1)
        cases[f"{dtype}, {granularity}, {sparsity}"] = {
            "wanted": wanted, "kept": kept, "densified": plain, "same_bits": same_bits,
        }  # fmt: skip
    exact = all(case["wanted"] == case["kept"] == case["densified"] for case in cases.values())
    session.report(cases=cases, exact=exact, same_bits=all(case["same_bits"] for case in cases.values()))


@torch.no_grad()
def selects_as_the_cpu(controller: SparsityController) -> bool:
    """Return whether the selection on the device is that of the CPU for the same values, bit for bit."""
    values = [critical_offsets(layer, torch.zeros(()).to(layer.raw))[0] for layer in controller._layers]
    costs, keep = range(1, len(values) + 1), torch.tensor(controller._keep)
    found = select(values, costs, keep.to(values[0].device))
    return all(
        torch.equal(a.cpu(), b) for a, b in zip(found, select([v.cpu() for v in values], costs, keep), strict=True)
    )
