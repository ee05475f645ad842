"""The calls by which a compiled network is compared with its model."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from str_triton.deploy.sparse.graph.signature import Signature

Call = tuple[tuple, dict[str, Any]]


def clone(tree: Any) -> Any:
    """Return arguments with tensors of their own, in the same memory format."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def as_parameters(tree: Any) -> Any:
    """Return arguments with parameters of their own, which require gradients and have them."""

    def parameter(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        made = nn.Parameter(leaf.detach().clone())
        made.grad = torch.zeros_like(leaf)
        return made

    return pytree.tree_map(parameter, clone(tree))


def as_results(tree: Any) -> Any:
    """Return arguments with tensors of their own that operations with gradients have made."""
    with torch.enable_grad():
        return pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf, as_parameters(tree)
        )


def as_views(tree: Any) -> Any:
    """Return arguments whose tensors are parts of larger ones, and have been written to."""

    def view(leaf: Any) -> Any:
        return leaf.new_empty((2, *leaf.shape))[1].copy_(leaf) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(view, tree)


def calls(signature: Signature, args: tuple, kwargs: dict[str, Any]) -> list[Call]:
    """Return calls that show whether a network is right: the example, and other values in another batch.

    The example comes twice, because calls may leave a state behind.
    """
    batches = _batches(signature, args, kwargs)
    other = resized(args, kwargs, batches, signature.leaves)
    if not signature.fits(pytree.tree_leaves(other)):
        other = resized(args, kwargs, {}, signature.leaves)
    return [(args, kwargs), (args, kwargs), other, (args, kwargs)]


def calls_with_ones(signature: Signature, args: tuple, kwargs: dict[str, Any], opened: Sequence[str]) -> list[Call]:
    """Return calls in which one size, or two of the `opened` sizes, are one; or two, where the example's is one.

    torch does not see every branch on a size of one: it keeps no condition where a dimension would be squeezed.
    """
    olds, batches = signature.values(pytree.tree_leaves((args, kwargs))), _batches(signature, args, kwargs)
    changes = [{name: (old, 2 if old == 1 else 1)} for name, old in olds.items() if name not in batches]
    changes += [dict.fromkeys(pair, (0, 1)) for pair in itertools.combinations(opened, 2)]
    found = [resized(args, kwargs, change, signature.leaves) for change in changes]
    return [call for call in found if signature.fits(pytree.tree_leaves(call))]


def _batches(signature: Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the open sizes of first dimensions, as (old, new)."""
    olds = signature.values(pytree.tree_leaves((args, kwargs)))
    first = (leaf.sizes[0] for leaf in signature.leaves if leaf.sizes and leaf.sizes[0] in olds)
    return {name: (olds[name], 2 if olds[name] == 1 else 1) for name in first}


def resized(args: tuple, kwargs: dict[str, Any], sizes: dict[str, tuple[int, int]], leaves: Sequence[Any]) -> Any:
    """Return other arguments: values drawn from the example's, and other sizes by their names, as (old, new)."""
    generator = torch.Generator().manual_seed(0)

    def other(given: Any, leaf: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        shape = [sizes[size][1] if size in sizes else n for size, n in zip(leaf.sizes, given.shape, strict=True)]
        flat = given.detach().reshape(-1)
        if not flat.numel():
            return torch.zeros(shape, dtype=given.dtype, device="cpu")
        count = torch.Size(shape).numel()
        return flat[torch.randint(flat.numel(), (count,), generator=generator, device="cpu")].reshape(shape)

    flat, structure = pytree.tree_flatten((args, kwargs))
    return pytree.tree_unflatten([other(given, leaf) for given, leaf in zip(flat, leaves, strict=True)], structure)


def restrided(args: tuple, kwargs: dict[str, Any], channels_last: bool) -> list[Call]:
    """Return calls with the same values and other strides: the first dimension last, and images in channels_last."""

    def turned(given: Any) -> Any:
        is_wide = isinstance(given, Tensor) and given.dim() > 1
        return given.transpose(0, -1).contiguous().transpose(0, -1) if is_wide else given

    def image(given: Any) -> Any:
        is_image = isinstance(given, Tensor) and given.dim() == 4
        return given.contiguous(memory_format=torch.channels_last) if is_image else given

    return [pytree.tree_map(change, (args, kwargs)) for change in ((turned, image) if channels_last else (turned,))]
