"""State dicts of sparsified models, without the model, as the ones of plain models."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from str_triton.nn.low_rank import LowRankWeight
from str_triton.nn.shards import local
from str_triton.nn.state import OPTIONS, RAW, saved_options, unmark
from str_triton.ops.soft_threshold import soft_threshold

_PARAMETRIZATION = re.compile(r"(.*?)parametrizations\.([^.]+)\.0\.", re.DOTALL)
_FACTORS = ("u", "v", "m")
T = TypeVar("T", bound=Tensor | LowRankWeight)


@torch.no_grad()
def plain_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the plain model for the one of a sparsified model, as `densify` would give it.

    Thresholds are applied; raw thresholds and their options are gone. A matrix P in factors (`LowRankWeight`) gives P.u
    and P.v of its surviving components, or P where dense is not larger, as `compact()` does. Every other tensor is the
    same object. Tensors that share memory and a threshold become one tensor. A plain state dict comes back unchanged.

    Args:
        state: names to tensors, such as a model's `state_dict()` or the content of a file.

    Raises:
        ValueError: a raw threshold without its g (saved by a version before these were written), options that cannot be
            read, or shapes that do not fit; one line that names the key.
    """
    if isinstance(state, nn.Module):
        raise TypeError("plain_state_dict takes a state dict, got a module: pass model.state_dict()")
    plain = dict(state)
    made: dict[tuple, list[tuple[Tensor, Any, list[Tensor]]]] = {}  # by places in memory and g
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or key.rpartition(".")[2] not in (RAW, OPTIONS):
            continue
        prefix = key.removesuffix(RAW).removesuffix(OPTIONS)
        raw = state.get(prefix + RAW)
        g = saved_options(plain, prefix)
        plain.pop(prefix + RAW, None)
        if g is None:
            continue  # The other key of the two was first.
        if raw is None:
            if _weight_key(prefix) not in plain:
                continue  # safetensors' save_model leaves out the second name of a shared tensor.
            raise ValueError(f"{prefix + OPTIONS!r} has no {prefix + RAW!r} beside it")
        if all(prefix + factor in plain for factor in _FACTORS):
            _replace_factors(plain, prefix, raw, g, made)
        else:
            _replace_weight(plain, _weight_key(prefix), raw, g, made)
    return plain


def _weight_key(prefix: str) -> str:
    match = _PARAMETRIZATION.fullmatch(prefix)
    return match[1] + match[2] if match else f"{prefix}weight"


def _replace_weight(plain: dict[str, Tensor], key: str, raw: Tensor, g: str, made: dict) -> None:
    if key not in plain:
        return  # Files without shared tensors, such as transformers', leave out the second name of a tied weight.
    if not unmark(plain, key, plain[key][0] if plain[key].dim() else plain[key]):
        raise ValueError(
            f"{key!r} is of shape {list(plain[key].shape)}: a thresholded weight has a first dimension of 1"
        )
    weight = plain[key]

    def compute() -> Tensor:
        try:
            return soft_threshold(weight, raw, g=g) + 0.0  # As densify: pruned weights have no sign.
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key!r} does not fit its raw threshold: {error}") from None

    plain[key] = _shared(made, (weight,), raw, g, compute)


def _replace_factors(plain: dict[str, Tensor], prefix: str, raw: Tensor, g: str, made: dict) -> None:
    """Replace the entries of a `LowRankWeight` by the ones of its compact form."""
    u, v, m = (plain[prefix + factor] for factor in _FACTORS)
    fits = u.dim() == v.dim() == 2 and m.shape == u.shape[1:] == v.shape[1:] and raw.shape == (1,)
    if not (fits and 1 <= u.shape[1] <= min(len(u), len(v))):
        raise ValueError(f"{prefix}u, {prefix}v, {prefix}m and {prefix}{RAW} do not fit each other")

    def compute() -> Tensor | LowRankWeight:
        matrix = LowRankWeight(len(u), len(v), u.shape[1], g=g, device="meta", dtype=u.dtype)
        for name, tensor in (("u", u), ("v", v), ("m", m), (RAW, raw)):
            setattr(matrix, name, nn.Parameter(tensor, requires_grad=False))
        compact = matrix.compact()
        return matrix.weight() if compact is None else compact

    stored = _shared(made, (u, v, m), raw, g, compute)
    if isinstance(stored, Tensor):
        new = {prefix[:-1] or "weight": stored}
    else:
        new = {f"{prefix}u": stored.u.detach(), f"{prefix}v": stored.v.detach()}
    items = list(plain.items())
    plain.clear()
    for key, tensor in items:  # The new entries take the place of u.
        if key == f"{prefix}u":
            plain.update(new)
        elif key not in (f"{prefix}v", f"{prefix}m"):
            plain[key] = tensor


def _shared(made: dict, sources: tuple[Tensor, ...], raw: Tensor, g: str, compute: Callable[[], T]) -> T:
    """Return what was computed from the same memory and an equal threshold before, or compute it."""
    # A DTensor's own storage is made at each look, so that its address says nothing and differs between processes.
    here = [local(source) for source in sources]
    places = ((t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype) for t in here)
    before = made.setdefault((g, *places), [])
    for other, value, _ in before:
        if other is raw or (not raw.is_meta and not other.is_meta and torch.equal(other, raw)):
            return value
    value = compute()
    before.append((raw, value, here))  # what lives keeps its address
    return value
