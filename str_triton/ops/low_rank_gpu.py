"""The low-rank time loops on a GPU, for every cell: the launcher of kernels/low_rank_rnn.py.

The functions take and return what those of low_rank_cpu.py do; here `p` and `saved` hold what the forward saves. The
kernels get hidden sizes that are multiples of 16: others are padded with units that stay 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from str_triton.ops.low_rank_cell import CELLS, Cell, grad_v
from str_triton.ops.low_rank_checks import check_lengths, rnn_precision
from str_triton.ops.low_rank_plan import layout, padded, saved_shape
from str_triton.ops.schedule import last_state
from str_triton.ops.tensors import compute_dtype


def shared_memory_limit(device: torch.device) -> int | None:
    """Return the bytes that one program may use on this GPU, for `low_rank_plan`; None for the CPU."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    # What a program has to ask for; ROCm knows no such thing.
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which takes seconds.
vars(shared_memory_limit)["_dynamo_marked_constant"] = True


def chip(device: torch.device) -> str:
    """Return the GPU's kind: "nvidia", or by the threads of a warp "cdna" (64) or "rdna" (32)."""
    if torch.version.hip is None:
        return "nvidia"
    return "cdna" if torch.cuda.get_device_properties(device).warp_size == 64 else "rdna"


def forward(
    cell: str, gates_x: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, states: list[Tensor],
    lengths: Tensor | None, reverse: bool, save: bool, precision: str | None, native: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return outputs, the last states, p and saved."""
    from str_triton.kernels import low_rank_cells
    from str_triton.kernels.low_rank_rnn import low_rank_rnn_forward_kernel as kernel

    of, (steps, batch, _), (hidden, rank) = CELLS[cell], gates_x.shape, v.shape
    lengths, size = _lengths(lengths, gates_x), padded(hidden)
    gates_x, bias, v = _pad(gates_x, hidden), _pad(bias, hidden), _pad(v, hidden, 0)
    w, (h0, *c0) = _pad(w, hidden, 0), [_pad(state, hidden) for state in states]
    (outputs,) = _buffers(gates_x, lengths, size)
    (p,) = _buffers(gates_x, lengths, rank) if save else (gates_x.new_empty(0),)
    saved = gates_x.new_empty(saved_shape(of, steps, batch, hidden) if save else 0)
    c = [torch.empty_like(state) for state in c0]
    if h0.numel():
        options = _options(of, v, lengths, reverse, precision, backward=False)
        state = h0.new_empty(0 if options["RESIDENT"] else h0.shape, dtype=compute_dtype(h0))
        with torch.cuda.device_of(gates_x):
            kernel[_grid(batch, options)](
                gates_x, w, v, bias, scale, h0, _only(c0), lengths, outputs, _only(c), p, saved,
                state, steps, batch, size, rank,
                STEP=getattr(low_rank_cells, cell), BIASES=of.bias_blocks, SAVE=save, **options,
            )  # fmt: skip
    outputs, *c = (tensor[..., :hidden].contiguous() for tensor in (outputs, *c))
    return [outputs, last_state(outputs, lengths, reverse), *c, p, saved]


def backward(
    cell: str, grad_outputs: Tensor, grad_states: list[Tensor], gates_x: Tensor, outputs: Tensor, p: Tensor,
    saved: Tensor, w: Tensor, v: Tensor, bias: Tensor, scale: Tensor, states: list[Tensor],
    lengths: Tensor | None, reverse: bool, precision: str | None, native: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of gates_x, w, v, bias, scale and the states."""
    from str_triton.kernels import low_rank_cells
    from str_triton.kernels.low_rank_rnn import low_rank_rnn_backward_kernel as kernel

    of, (steps, batch, _), (hidden, rank) = CELLS[cell], outputs.shape, v.shape
    lengths, size, h0 = _lengths(lengths, outputs), padded(hidden), states[0]
    wide = [_pad(tensor, hidden) for tensor in (grad_outputs, outputs)]
    grad_h, *grad_c = (_pad(grad, hidden) for grad in grad_states)
    first = _pad(states[-1], hidden)
    grad_x, grad_extra, grad_p = _buffers(wide[0], lengths, of.gates * size, of.extra * size, rank)
    grad_firsts = [torch.empty_like(first) for _ in states]
    options = _options(of, v, lengths, reverse, precision, backward=True)
    state = first.new_empty(0 if options["RESIDENT"] else first.shape, dtype=compute_dtype(first))
    grad_scale = scale.new_zeros((*_grid(batch, options), of.scalars))
    if h0.numel():
        with torch.cuda.device_of(outputs):
            kernel[_grid(batch, options)](
                wide[0], grad_h, _only(grad_c), wide[1], saved, _pad(w, hidden, 0), _pad(v, hidden, 0), scale,
                first, lengths, grad_x, grad_extra, grad_p, grad_scale, grad_firsts[0], _only(grad_firsts[1:]),
                state, steps, batch, size, rank,
                STEP=getattr(low_rank_cells, f"{cell}_backward"), **options,
            )  # fmt: skip
    grad_x = grad_x.unflatten(2, (of.gates, size))[..., :hidden].flatten(2)
    grad_extra = grad_extra[..., :hidden]
    with torch.autocast(outputs.device.type, enabled=False):
        flat, extra, p = (tensor.flatten(0, 1) for tensor in (grad_x, grad_extra, p))
        if of.biases is None:
            # Of R h + bias.
            parts = [flat[:, :-hidden], extra] if of.extra else [flat]
            grad_w, grad_bias = torch.cat([part.t() @ p for part in parts]), torch.cat([part.sum(0) for part in parts])
        else:
            # The first bias is inside one activation, the second inside the other of the same sum.
            of_first, of_both = (grad.sum(0, dtype=compute_dtype(grad)) for grad in (extra, flat))
            grad_w, grad_bias = flat.t() @ p, torch.cat((of_first, of_both - of_first)).to(flat.dtype)
        grad_v_ = grad_v(outputs, h0, grad_p, lengths, reverse)
    grad_states = [grad[:, :hidden].contiguous() for grad in grad_firsts]
    return [grad_x, grad_w, grad_v_, grad_bias, grad_scale.sum(0), *grad_states]


def _options(
    cell: Cell, v: Tensor, lengths: Tensor | None, reverse: bool, precision: str | None, backward: bool
) -> dict[str, Any]:
    """Return the constants and the launch options of a kernel."""
    import triton.language as tl

    kind, limit, (hidden, rank) = chip(v.device), shared_memory_limit(v.device), v.shape
    plan = layout(cell, hidden, rank, v.dtype, limit or 0, backward, kind)
    return {
        "GATES": cell.gates,
        "SAVED": cell.saved,
        "SCALARS": cell.scalars,
        "HAS_LENGTHS": lengths is not None,
        "REVERSE": reverse,
        "RESIDENT": plan.kind == "resident",
        "WHOLE": plan.kind == "resident" and plan.block_hidden == padded(len(v)),
        # Most of AMD's chips have no TF32.
        "PRECISION": (precision or rnn_precision()) if v.dtype == torch.float32 and kind == "nvidia" else "ieee",
        "APPROX": kind == "nvidia" and v.dtype != torch.float64,
        "COMPUTE": tl.float64 if v.dtype == torch.float64 else tl.float32,
        "SPLIT": max(1, min(plan.warps, plan.block_hidden // 16)),
        "BLOCK_B": plan.block_batch,
        "BLOCK_H": plan.block_hidden,
        "BLOCK_R": plan.block_rank,
        "num_warps": plan.warps,
        "num_stages": 1,
        **({"AHEAD": plan.ahead} if backward else {}),
    }


def _only(tensors: list[Tensor]) -> Tensor | None:
    """Return the only tensor of a list; None for the empty list of a cell without c."""
    return tensors[0] if tensors else None


def _pad(x: Tensor, hidden: int, dim: int = -1) -> Tensor:
    """Widen each block of `hidden` along a dimension with zeros; return x itself where nothing is missing."""
    missing = padded(hidden) - hidden
    if not missing:
        return x
    blocks = x.unflatten(dim, (-1, hidden)) if hidden else x
    return F.pad(blocks, (0, missing) if dim else (0, 0, 0, missing)).flatten(*((-2, -1) if dim else (0, 1)))


def _lengths(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """Move lengths to x's device. Those that come on a GPU are kept within the tensors: a check would synchronize."""
    if lengths is None:
        return None
    if lengths.device.type == "cpu":
        check_lengths(lengths, len(x))
        return lengths.to(x.device)
    return lengths.clamp(1, len(x))


def _buffers(like: Tensor, lengths: Tensor | None, *widths: int) -> list[Tensor]:
    """Make buffers [steps, batch, width] for a kernel that writes where sequences run; zero elsewhere."""
    new = like.new_empty if lengths is None else like.new_zeros
    return [new((*like.shape[:2], width)) for width in widths]


def _grid(batch: int, options: dict[str, Any]) -> tuple[int]:
    return (-(-batch // options["BLOCK_B"]),)
