"""Packing of models into files and unpacking: pack, unpack, inspect (docs/packed-format.md)."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from str_triton.budget.budget import Budget
from str_triton.budget.rank_budget import RankBudget, count_ranks
from str_triton.deploy.content import (
    DTYPES,
    VALUES,
    Content,
    Shared,
    Stored,
    budget_of,
    budget_record,
    own_arrays,
    part_names,
)
from str_triton.deploy.encoding import NAMES, decode, dtype_name, encode, rounded
from str_triton.deploy.packed_file import VERSION, PackedFile, Part, digest, read_packed, write_packed
from str_triton.deploy.plain_state import plain_state, unwrapped
from str_triton.deploy.summary import PackedSummary, PackedTensor
from str_triton.deploy.typed_json import loads
from str_triton.nn import warn_if_unfinished


def pack(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    values: str = "float32",
    *,
    budget: Budget | RankBudget | None = None,
    metadata: Mapping[str, Any] | None = None,
    plain_zeros: bool = False,
) -> PackedSummary:
    """Write a model's tensors without their zeros to the file `path` (docs/packed-format.md).

    A tensor of any layer is stored as its nonzero values and their positions if that is smaller, else dense. Layers
    with thresholds store the weights of their forward pass. Low-rank matrices store their surviving components, as
    `compact()` returns them. Shared tensors are stored once. Wrappers (torch.compile, DataParallel) are removed. The
    model is not changed.

    Args:
        model: a module, or the state dict of one.
        path: the file, in the format of safetensors. An existing file is replaced atomically.
        values: "float32": every tensor keeps its dtype and every bit, float64 too. "float16" or "bfloat16": tensors of
            two or more dimensions with a wider floating-point dtype are rounded to it; vectors and scalars (biases,
            norms, running statistics) are not.
        budget: the result of `count` or `count_ranks`, stored for `inspect` and `model_card`. None: it is counted here
            if the model has matrices in factors, which needs no example input.
        metadata: further facts to store, of JSON's types.
        plain_zeros: store -0.0 as 0.0. The sign costs a bit per zero where many zeros are negative, as after
            weight * mask. Outputs change at most in the sign of a zero.

    Returns:
        A summary of the file, as from `inspect`.

    Raises:
        ValueError: unknown `values`, an entry that is not a tensor or has no values, a dtype that safetensors lacks, or
            a value too large for `values`, or a thresholded weight that other code computes since `sparsify`
            (weight_norm, pruning); the message names the tensor or layer. Nothing is written.
        TypeError: a model, budget or metadata of another type.
        OSError: the file cannot be written, for example on a full disk. `path` is not changed, and no other file is
            left behind.

    Warns:
        UserWarning: no tensor got smaller, so all are stored dense; or the model does not meet its controller's
            target. The file is complete in both cases.
    """
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(map(repr, VALUES))}, got {values!r}")
    if isinstance(model, nn.Module):
        warn_if_unfinished(model)
        model = unwrapped(model)
    state, products = plain_state(model)
    if budget is None and products and isinstance(model, nn.Module):
        budget = count_ranks(model)
    budget_kept, metadata_kept = budget_record(budget), _metadata_record(metadata)
    parts, entries = _encoded(state, VALUES[values], plain_zeros)
    content = Content(values, budget_kept, metadata_kept, products, entries)
    nbytes = write_packed(path, parts, content)
    summary = _summary(PackedFile(content, parts, nbytes))
    if not summary.is_smaller:
        warnings.warn(f"pack: {path}: {summary.remarks()[-1]}", stacklevel=2)
    return summary


def unpack(path: str | os.PathLike[str], *, factors: bool = False) -> dict[str, Tensor]:
    """Return the tensors in a packed file, on the CPU, as a state dict for `load_state_dict(..., strict=True)`.

    They have the model's shapes and dtypes, and equal the stored values bit for bit. A shared tensor is one object
    under several names.

    Args:
        path: the file.
        factors: the treatment of a matrix P that is stored in factors. False: return P itself, the product u v^T, under
            its name in the plain model, such as nn.GRU's weight_hh_l0. True: return P.u and P.v, as stored, which is
            the state dict of the `compact()` model. (The factors cannot be recovered from P, which is rounded.)

    Raises:
        ValueError: a byte of the file has changed, or it is truncated, not packed, or of another version; the message
            names the damaged tensor or the version.
        OSError: the file cannot be read.
    """
    file = read_packed(path)
    state: dict[str, Tensor] = {}
    for name, entry in file.content.tensors.items():
        if isinstance(entry, Shared):
            state[name] = state[entry.same_as]
            continue
        try:
            state[name] = decode(name, entry, file.parts).to(DTYPES[entry.dtype])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return state if factors else _multiplied_out(state, file.content.products)


def inspect(path: str | os.PathLike[str]) -> PackedSummary:
    """Return a summary of a packed file. Check every byte of it, and raise as `unpack` does."""
    return _summary(read_packed(path))


def _encoded(
    state: Mapping[str, Tensor], values: str | None, plain_zeros: bool
) -> tuple[dict[str, Part], dict[str, Shared | Stored]]:
    """Return the parts of all tensors, and an entry for each tensor. ``values`` is the dtype to round to, or None."""
    parts: dict[str, Part] = {}
    entries: dict[str, Shared | Stored] = {}
    first: dict[tuple, str] = {}
    for name, tensor in state.items():
        if taken := {"__metadata__", *part_names(name)} & state.keys():
            raise ValueError(f"tensor {min(taken)!r}: the packed format uses this name itself; rename the tensor")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            entries[name] = Shared(first[place])
            continue
        stored = tensor if values is None else rounded(name, tensor, DTYPES[values])
        own, entry = encode(name, stored, plain_zeros=plain_zeros)
        parts |= own
        hashed = digest(*(own[key].data for key in own_arrays(name, own)))
        entries[name] = Stored(dtype=NAMES[tensor.dtype], **entry, sha256=hashed)
    return parts, entries


def _multiplied_out(state: dict[str, Tensor], products: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Replace the factors of each matrix by their product. Shared tensors stay shared."""
    matrix_of = {u: (name, v) for name, (u, v) in products.items()}
    second = {v for _, v in products.values()}
    made: dict[tuple[int, int], Tensor] = {}
    plain = {}
    for name, tensor in state.items():
        if name in matrix_of:
            matrix, v = matrix_of[name]
            key = (id(tensor), id(state[v]))
            if key not in made:
                made[key] = tensor @ state[v].mT
            plain[matrix] = made[key]
        elif name not in second:
            plain[name] = tensor
    return plain


def _summary(file: PackedFile) -> PackedSummary:
    content = file.content
    return PackedSummary(
        version=VERSION,
        values=content.values,
        nbytes=file.size,
        tensors=tuple(_packed_tensor(name, content, file.parts) for name in content.tensors),
        products=dict(content.products),
        budget=budget_of(content),
        metadata=content.metadata,
    )


def _packed_tensor(name: str, content: Content, parts: Mapping[str, Part]) -> PackedTensor:
    source, entry = content.source(name), content.stored(name)
    own = own_arrays(source, parts)
    sizes = {key: parts[key].data.size for key in own}
    dtype, stored = DTYPES[entry.dtype], DTYPES[parts[own[0]].dtype]
    plain = PackedTensor(
        name=name,
        shape=tuple(entry.shape),
        dtype=dtype_name(dtype),
        stored_dtype=dtype_name(stored),
        encoding="dense" if entry.low_bits is None else "gaps" if entry.low_bits else "bitmask",
        nonzeros=entry.nonzeros,
        nbytes=sum(sizes.values()),
        sign_nbytes=sizes.get(part_names(source)[2], 0),
        dense_nbytes=0,
    )
    if source != name:
        return dataclasses.replace(plain, encoding="shared", nbytes=0, sign_nbytes=0)
    return dataclasses.replace(plain, dense_nbytes=plain.elements * dtype.itemsize)


def _metadata_record(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the metadata as JSON will return them."""
    try:
        return loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be a mapping of names to values of JSON's types: {error}") from None
