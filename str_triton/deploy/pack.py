"""pack, unpack, inspect: a model as a packed file, and back (docs/packed-format.md)."""

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
    """Write a model's tensors to `path`, and to nowhere else, without their zeros (docs/packed-format.md).

    The zeros decide, whatever the layer: a tensor is stored as its other values and their positions where that is
    smaller, else as it is. Thresholded layers store what their forward uses, matrices with a learned rank the surviving
    components (as `compact()` gives them), shared tensors are stored once. Wrappers (torch.compile, DataParallel) are
    looked through. The model stays as it is.

    Args:
        model: a module, or the state dict of one.
        path: of the file, a safetensors file; an old one is replaced once the new one is whole.
        values: "float32": every tensor keeps its dtype and every bit, float64 too. "float16" or "bfloat16": tensors of
            two or more dimensions whose floating-point dtype is wider are rounded to it; vectors and scalars (biases,
            norms, running statistics) stay.
        budget: from `count` or `count_ranks`, kept in the file for `inspect` and `model_card`. None: a model with
            matrices in factors is counted here, which takes no example input.
        metadata: further facts to keep, of JSON's types.
        plain_zeros: store -0.0 as 0.0. Its sign costs a bit per zero where many are negative, as weight * mask leaves
            them; no output changes by it, but for the sign of a zero.

    Returns:
        What the file holds, as `inspect` does.

    Raises:
        ValueError: unknown `values`, an entry that is no tensor or has no values, a dtype that safetensors lacks, or a
            value too large for `values`; the message names the tensor. Nothing is written.
        TypeError: a model, budget or metadata of another type.
        OSError: the file cannot be written (a full disk); `path` is as it was, and nothing is left beside it.

    Warns:
        UserWarning: no tensor got smaller, so that the file stores all of them dense; or the model's controller has not
            reached its target. The file is whole in either case.
    """
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(map(repr, VALUES))}, got {values!r}")
    if isinstance(model, nn.Module):
        warn_if_unfinished(model)
        model = unwrapped(model)
    state, products = plain_state(model)
    if budget is None and products:
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
    """The tensors in a packed file, on the CPU, as a state dict: for `load_state_dict(..., strict=True)`.

    They have the shapes and dtypes that they had in the model, and equal what was stored bit for bit; shared ones are
    one object under several names.

    Args:
        path: of the file.
        factors: what to do with a matrix P that is stored in factors. False: P itself, the product u v^T, under the
            name that it has in the plain model (nn.GRU's weight_hh_l0 for one). True: P.u and P.v, as stored: the state
            dict of the `compact()` model, which a product, rounded as matrix products are, cannot give back.

    Raises:
        ValueError: any byte of the file has changed, it is cut off, not packed, or of another version; the message
            names the tensor that is damaged, or the version. Nothing is returned of such a file.
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
    """What a packed file holds, every byte of it checked; raises as `unpack` does."""
    return _summary(read_packed(path))


def _encoded(
    state: Mapping[str, Tensor], values: str | None, plain_zeros: bool
) -> tuple[dict[str, Part], dict[str, Shared | Stored]]:
    """Return the parts of all tensors, and an entry for each tensor. values: the dtype to round to, or None."""
    parts: dict[str, Part] = {}
    entries: dict[str, Shared | Stored] = {}
    first: dict[tuple, str] = {}
    for name, tensor in state.items():
        if taken := {"__metadata__", *part_names(name)} & state.keys():
            raise ValueError(f"tensor {min(taken)!r}: this name is taken by what the file stores; rename it")
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
    """Each matrix in the place of its first factor, none of the factors; what is shared stays so."""
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
    """Return the metadata as they will be read."""
    try:
        return loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be a mapping of names to values of JSON's types: {error}") from None
