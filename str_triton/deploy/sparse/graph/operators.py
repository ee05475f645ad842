"""The operations that a saved network may call, by name. None of them changes its arguments or leaves the process."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

# All functional overloads of these are allowed, but for those of TorchScript, which compute with numbers, lists and
# strings: torch.export does not write them, and some of them end the process (the remainder of a division by zero) or
# fill the memory (a list, repeated). Left out on purpose: operations that make uninitialized or random tensors, that
# read memory by strides of the caller's choice, or that use files, backward passes, and _weight_norm, gru, lstm,
# rnn_relu and rnn_tanh, which read past the end of arguments of unlike shapes.
_ATEN = """
__and__ __or__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_scalar _cdist_forward _conj
_local_scalar_dense _log_softmax _safe_softmax _softmax _to_copy _unsafe_view abs absolute acos acosh
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add addbmm addcdiv
addcmul addmm addr adjoint affine_grid_generator alias all amax amin aminmax any arange arccos arccosh arcsin arcsinh
arctan arctan2 arctanh argmax argmin argsort asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d
avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and bitwise_not bitwise_or bitwise_xor block_diag bmm
broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu channel_shuffle chunk clamp clamp_max
clamp_min clip clone col2im column_stack complex concat concatenate conj conj_physical constant_pad_nd contiguous
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution copysign cos cosh cosine_similarity
count_nonzero cross cummax cummin cumprod cumsum deg2rad det detach diag diag_embed diagonal diff dist div divide dot
dropout dstack einsum elu embedding eq erf erfc erfinv exp exp2 expand expand_as expm1 eye feature_dropout fft_fft
fft_fft2 fft_fftshift fft_ifft fft_ifft2 fft_ifftshift fft_irfft fft_irfft2 fft_rfft fft_rfft2 fill fix flatten flip
fliplr flipud float_power floor floor_divide fmax fmin fmod frac full full_like gather ge gelu ger glu greater
greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gt hardshrink hardsigmoid hardswish hardtanh
heaviside hstack hypot im2col imag index index_add index_copy index_fill index_put index_select inner instance_norm
isclose isfinite isinf isnan isneginf isposinf isreal item kron l1_loss layer_norm le leaky_relu lerp less
less_equal lgamma lift_fresh_copy linalg_matrix_norm linalg_multi_dot linalg_norm linalg_vector_norm linear linspace
log log10 log1p log2 log_sigmoid log_softmax logaddexp logcumsumexp logical_and logical_not logical_or logical_xor
logit logsumexp lt mH mT masked_fill masked_scatter masked_select matmul matrix_H max max_pool1d max_pool2d
max_pool2d_with_indices max_pool3d maximum mean median meshgrid min minimum mish mm moveaxis movedim mse_loss msort mul
multiply mv nan_to_num nanmean nansum narrow native_group_norm native_layer_norm ne neg negative new_full new_ones
new_zeros nonzero norm normalize not_equal numpy_T one_hot ones ones_like outer pad pairwise_distance permute
pixel_shuffle pixel_unshuffle polar positive pow prelu prod quantile rad2deg ravel real reciprocal reflection_pad1d
reflection_pad2d reflection_pad3d relu relu6 remainder repeat repeat_interleave replication_pad1d replication_pad2d
replication_pad3d reshape reshape_as resolve_conj rms_norm roll rot90 round row_stack rsqrt rsub
scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter selu
sgn sigmoid sign signbit silu sin sinc sinh slice slice_scatter smooth_l1_loss softmax softplus softshrink sort
special_erf special_expit special_log_softmax special_softmax split split_with_sizes sqrt square squeeze stack std
std_mean stft sub subtract sum swapaxes swapdims sym_numel sym_size t take take_along_dim tan tanh tensor_split
tensordot threshold tile to topk trace transpose tril triu true_divide trunc type_as unbind unflatten unfold unsqueeze
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d var var_mean vdot view view_as view_as_complex view_as_real vstack where xlogy zeros zeros_like
"""
ATEN = frozenset(_ATEN.split())
# Arithmetic on sizes, and the parts of a tuple.
SCALARS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "neg")
    },
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "getitem", "and_", "or_")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float")},
}
# Torch does not check numbers in their place, and ends the process.
_OPTIONS = {
    "ScalarType": torch.dtype,
    "MemoryFormat": torch.memory_format,
    "Layout": torch.layout,
    "Device": torch.device,
}
_NAMES = {function: name for name, function in SCALARS.items()}


def operator_name(target: Any) -> str | None:
    """Return the name under which `resolve` finds an operation; None for what has none."""
    if isinstance(target, OpOverload):
        return f"ops.{target}"
    if isinstance(target, HigherOrderOperator):
        return f"ops.higher_order.{target.name()}"
    return _NAMES.get(target)


def resolve(name: str) -> Any:
    """Return the operation of this name, whichever this process has: check names from files by `allowed` first."""
    if name in SCALARS:
        return SCALARS[name]
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part)
    return found


def allowed(name: Any) -> bool:
    """Check that a file may call the operation of this name."""
    if not isinstance(name, str) or name in SCALARS:
        return isinstance(name, str)
    parts = name.split(".")
    if len(parts) != 4 or parts[:2] != ["ops", "aten"] or parts[2] not in ATEN or parts[3].startswith("_"):
        return False
    packet = getattr(torch.ops.aten, parts[2], None)
    if packet is None or parts[3] not in packet.overloads():
        return False
    found = getattr(packet, parts[3])
    if not torch._C._dispatch_has_kernel(found.name()):
        return False
    schema = found._schema
    return not schema.is_mutable and not any(argument.is_out for argument in schema.arguments)


def wrong_argument(target: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Return the name of an argument that torch would take without a check, and that ends the process.

    That is what must be a dtype, a memory format, a layout or a device, and is none of these; and the option of
    attention that divides by the number of heads. None: there is none. Torch itself checks all other types.
    """
    if not isinstance(target, OpOverload):
        return None
    for place, argument in enumerate(target._schema.arguments):
        kind = _OPTIONS.get(str(argument.real_type).removeprefix("Optional[").removesuffix("]"))
        given = args[place] if place < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        is_option = kind is None or given is None or isinstance(given, kind)
        if not is_option or (argument.name == "enable_gqa" and given not in (None, False)):
            return argument.name
    return None
