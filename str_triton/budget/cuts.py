"""The cut of a sparsity controller's layers: on their device without waiting for it, and with exact counts on the host.

Offsets are measured from the raw threshold that no floor has held back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from str_triton.budget.allocate import NotANumberError, Source, allocate
from str_triton.budget.errors import DivergedError
from str_triton.budget.inventory import Layer
from str_triton.budget.processes import Processes
from str_triton.budget.select import select
from str_triton.nn.shards import shard_dimension


def common_cut(layers: Sequence[Layer], held_back: dict[int, Tensor], budget: int | Tensor) -> tuple:
    """Return the two offsets to cut all layers between, and the largest offset of each raw threshold by its id.

    Args:
        layers: the layers.
        held_back: for the id of each raw threshold, how far its floor holds it back.
        budget: the cost of the survivors.
    """
    critical, caps = [], {}
    for layer in layers:
        values, cap = critical_offsets(layer, held_back[id(layer.raw)])
        critical.append(values)
        caps[id(layer.raw)] = cap
    keep = torch.zeros((), dtype=torch.int64, device=layers[0].raw.device) + budget
    return *select(critical, [layer.cost for layer in layers], keep), caps


def separate_cuts(layers: Sequence[Layer], keep: Sequence[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return what `OffsetController._cut` returns for layers of which each keeps a number of its own."""
    device, cuts = layers[0].raw.device, []
    for layer, count in zip(layers, keep, strict=True):
        values = layer.weight.pruning_offsets().flatten().to(torch.float32)
        cuts.append(select([values], [1], torch.full((), count, device=device)))
    below, above = (torch.stack(cut) for cut in zip(*cuts, strict=True))
    return below, above, [torch.full((), torch.inf, device=device)] * len(cuts)


def exact_cut(
    layers: Sequence[Layer], references: Sequence[Tensor], keep: int | Sequence[int], processes: Processes
) -> tuple[list[int], dict[int, tuple[float, float]]]:
    """Return how many elements each layer keeps; and each raw threshold's offset by its id, without and with floor.

    Args:
        layers: the layers.
        references: for each layer its raw threshold's place in the common order, as in `Source`.
        keep: the cost of all survivors; or for each layer how many elements survive.
        processes: the processes that hold the weights.

    Raises:
        NotANumberError: a weight holds NaN.
    """
    sources = [_source(layer, reference, processes) for layer, reference in zip(layers, references, strict=True)]
    if isinstance(keep, int):
        found = allocate(sources, keep, processes)
        caps = {id(layer.raw): cap for layer, cap in zip(layers, found.caps, strict=True)}
        return found.kept, {raw: (found.offset, min(found.offset, cap)) for raw, cap in caps.items()}
    kept, offsets = [], {}
    for number, (source, layer, count) in enumerate(zip(sources, layers, keep, strict=True)):
        try:
            own = allocate([source], count, processes)
        except NotANumberError:
            raise NotANumberError(number) from None
        kept.append(own.kept[0])
        offsets[id(layer.raw)] = own.offset, own.offset
    return kept, offsets


def _source(layer: Layer, reference: Tensor, processes: Processes) -> Source:
    """Return this process's part of a layer. A weight that every process has counts in process 0 only."""
    weight = layer.weight.local_dense
    if processes.rank > 0 and shard_dimension(layer.weight.dense) is None:
        weight, reference = weight[:0], reference[:0] if reference.numel() > 1 else reference
    return Source(weight, layer.weight.inverse, reference, layer.cost, layer.floor, layer.size)


def critical_offsets(layer: Layer, held_back: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offset from which each weight is pruned, inf in the floor, and the largest that keeps the floor."""
    values = (layer.weight.pruning_offsets() - held_back).flatten().to(torch.float32)
    if layer.floor == 0:
        return values, torch.full((), torch.inf, device=values.device)
    top = values.topk(min(layer.floor, values.numel()))
    last = top.values[-1]
    below = values.where(values < last, -torch.inf).amax()
    values.index_fill_(0, top.indices, torch.inf)
    return values, torch.where(below.isinf(), last - 1, (last + below) / 2)


def diverged(layers: Sequence[Layer], error: NotANumberError) -> DivergedError:
    """Return the error that names the weight or the threshold that is not a number."""
    bad = [layer for layer in layers if not bool(layer.weight.local_raw.isfinite().all())]
    what = f"the raw threshold of {bad[0].name!r}" if bad else f"weight {layers[error.index].name!r}"
    value = "NaN" if not bad or bool(bad[0].weight.local_raw.isnan().any()) else "an infinity"
    return DivergedError(
        f"{what} holds {value}, so that no share of the weights can be pruned: training has diverged; go back "
        "to an earlier checkpoint"
    )
