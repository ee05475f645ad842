"""`compile_sparse`: a network with zeros in its weights, made fast on this machine's processor."""

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from str_triton.budget.count import warn_if_thresholds_are_bypassed
from str_triton.deploy.plain_state import unwrapped
from str_triton.deploy.sparse import file
from str_triton.deploy.sparse.agree import difference, integer_difference, same_values, takes_more, with_sizes_of_zero
from str_triton.deploy.sparse.calls import as_parameters, as_results, as_views, calls, calls_with_ones, clone, restrided
from str_triton.deploy.sparse.choose import choose
from str_triton.deploy.sparse.fallback import ModulewiseModel, layer_graph, layer_inputs, left_to_torch
from str_triton.deploy.sparse.graph.export import NotExported, exports
from str_triton.deploy.sparse.graph.fuse import fuse
from str_triton.deploy.sparse.graph.limit import SECONDS, Limit
from str_triton.deploy.sparse.graph.lower import lower
from str_triton.deploy.sparse.graph.nodes import Convolution, Graph
from str_triton.deploy.sparse.graph.ones import Exported, with_sizes_of_one
from str_triton.deploy.sparse.graph.recurrent import exportable
from str_triton.deploy.sparse.graph.signature import Signature, Unfit, check_tensor
from str_triton.deploy.sparse.model import CompiledModel, SparseModel
from str_triton.deploy.sparse.quantize.model import QuantizedModel
from str_triton.deploy.sparse.quiet import quiet
from str_triton.deploy.sparse.runtime.limits import require_memory
from str_triton.deploy.sparse.runtime.trial import try_out
from str_triton.deploy.sparse.state import change_in_place, changed_buffers, fresh
from str_triton.deploy.sparse.surroundings import plain_torch
from str_triton.machine import processor
from str_triton.native.build import library
from str_triton.nn import densify, warn_if_unfinished

_lock = threading.RLock()  # torch.export is not made for threads
BUSY = "the machine was busy while the executions were timed: compile again on a quiet one"


def compile_sparse(
    model: nn.Module,
    example_input: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    tune: bool = True,
) -> CompiledModel:
    """Make a copy of `model` for inference on the CPU in which every layer has the fastest execution that is exact.

    The model is exported by torch.export. Batch norms are folded into the convolution or linear layer before them.
    ReLU, ReLU6, biases and residual sums become part of it. For every convolution and linear layer the executions are
    timed on this machine with the real shapes: dense by torch (contiguous or channels_last), CSR by torch.sparse, and a
    sparse microkernel in C, which the system's compiler compiles once per machine. Without a compiler torch executes
    everything, with one warning. The zeros decide, not the type of the layer. All other operations are torch's own.

    Outputs differ from the model's by rounding, 1e-4 at most for networks of usual scale. A weight of zero is not
    multiplied, so an infinite or NaN pixel affects only the outputs that read it by other weights. The network is
    compared with the model before it is returned.

    A model that torch.export cannot take keeps its forward, and its layers are compiled one by one; `print` says why.

    Compilation and every call use `torch.get_num_threads()` threads: compile with the number that you will use. Threads
    that compile take turns.

    Args:
        model: plain, or with layers of `sparsify`, or made by `quantize`. It does not change.
        example_input: the model's argument, or a tuple of its arguments: tensors on the CPU, floating-point ones in
            float32, of the shapes that you will use most. Other shapes work as far as the export leaves sizes open.
        example_kwargs: the model's keyword arguments.
        tune: False: choose by a model of the costs, within a second, without timing.

    Returns:
        A module with `str(...)` or `.table()`, one line per layer, `.profile(x)` and `.save(path)`. Its `.left` lists
        the layers that torch must execute unchanged (transposed and 1-d convolutions and the like).

    Raises:
        TypeError, ValueError: the model is no module, has parameters that are not float32 on the CPU, cannot be copied,
            or does not take the example; or the example is not on the CPU or not float32.

    Warns:
        UserWarning: a model that does not meet its controller's target; a thresholded layer whose dense weight the
            forward reads.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile_sparse takes a module, got {type(model).__name__}")
    args = example_input if type(example_input) is tuple else (example_input,)
    kwargs = dict(example_kwargs or {})
    _check(args, kwargs)
    if isinstance(model, QuantizedModel):
        with _lock, torch.inference_mode(False), plain_torch():
            return _compile_quantized(model, *clone((args, kwargs)), tune)
    warn_if_unfinished(model)
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and (parameter.dtype, parameter.device.type) != (torch.float32, "cpu"):
            raise ValueError(
                f"compile_sparse takes float32 on the CPU, and {name} is {parameter.dtype} on {parameter.device}: "
                "model.float().cpu() first"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: call {type(model).__name__} once before compiling it")
        if type(tensor) in (nn.Parameter, Tensor):
            require_memory(tensor, name)
    with _lock, torch.inference_mode(False), plain_torch():
        return _compile(model, *clone((args, kwargs)), tune)


def load_sparse(path: str | os.PathLike[str]) -> SparseModel:
    """Load a network that `save` wrote, with its choices; without a compiler for the kernels, torch runs all layers.

    On a processor other than the one that it was saved on, the executions are chosen again.

    Raises:
        ValueError: the file is damaged, holds no compiled network, or one of another version.
        OSError: the file cannot be read.
    """
    content = file.read(path)
    shown = content.left, content.notes, content.example
    network = SparseModel(content.graph, content.signature, content.choices, *shown)
    network.is_from_file = True
    if content.processor != processor():
        with torch.inference_mode(False):
            network.retune()
    return network


def _check(args: tuple, kwargs: dict[str, Any]) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        given = type(args[0]).__name__ if len(args) == 1 else f"{len(args) + len(kwargs)} arguments without a tensor"
        raise TypeError(f"a compiled network takes one tensor, got {given}")
    for tensor in tensors:
        check_tensor(tensor, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        require_memory(tensor)


def _copied(model: nn.Module) -> nn.Module:
    """Return a dense copy of a model, in eval mode."""
    # Weights that a hook computes in every forward are no leaf tensors, and deepcopy refuses them.
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        copied = densify(copy.deepcopy(model, memo)).eval()
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied: {error}") from error
    # A layer alone needs a name in the table.
    return nn.Sequential(copied) if isinstance(copied, nn.Conv2d | nn.Linear) else copied


def _compile(model: nn.Module, args: tuple, kwargs: dict[str, Any], tune: bool) -> CompiledModel:
    dense = _copied(model)
    try:
        changed = changed_buffers(dense, *clone((args, kwargs)))
    except Exception as error:  # A wrong shape or a missing argument may raise anything.
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = f"shape {shapes[0]}" if len(shapes) == 1 else f"shapes {', '.join(map(str, shapes))}"
        raise ValueError(f"{type(model).__name__} does not take an example of {given}: {error}") from error
    warn_if_thresholds_are_bypassed(model, args, kwargs, stacklevel=4)
    if changed:
        change_in_place(dense, changed)
    problems = []
    try:
        if any(isinstance(given, PackedSequence) for given in (*args, *kwargs.values())):
            raise NotExported("it takes no packed sequences")
        for exported in _exports(dense, args, kwargs):
            try:
                _require_same(exported, dense, args, kwargs)
                exported = with_sizes_of_one(exported, args, kwargs)
                network = _lowered(exported, dense, args, kwargs, tune)
            except (NotExported, Unfit) as error:
                problems.append(str(error))
                continue
            except Exception as error:  # A bug of this package: the model still runs, and `print` says why.
                problems.append(f"its exported graph cannot be compiled: {type(error).__name__}: {error}")
                continue
            network.notes += exported.notes
            problem = _problem(network, exported, dense, args, kwargs, changed)
            if problem is None:
                network.reset(dict(dense.named_buffers()))
                return network
            problems.append(f"the exported graph is not used: {problem}")
    except NotExported as error:
        problems.append(f"torch.export: {error}")
    return _modulewise(model, args, kwargs, tune, f"{type(model).__name__} runs layer by layer; {problems[0]}")


def _problem(
    network: SparseModel, exported: Exported, model: nn.Module, args: tuple, kwargs: dict[str, Any], changed: set[str]
) -> str | None:
    """Return how a network differs from its model, whose calls change some buffers; None if it does not."""
    signature, inputs = network.signature, network.signature.tensors(args, kwargs)
    if forgotten := changed - network.state().keys():
        return f"it does not keep {min(forgotten)}, which a call changes"
    # Torch 2.13 crashes on some grouped convolutions with dilation in channels_last.
    layers = [node for node in network.graph.nodes if isinstance(node, Convolution)]
    is_safe = not any(layer.groups > 1 and layer.dilation != (1, 1) for layer in layers)
    strides = [(args, kwargs), *restrided(args, kwargs, channels_last=is_safe)]
    ones = calls_with_ones(signature, args, kwargs, exported.opened)

    def differs(sequence: Sequence[tuple[tuple, dict]], prepared: Callable[[Any], Any] = clone) -> str | None:
        network.reset(dict(model.named_buffers()))
        return difference(model, network, sequence, prepared)

    for sequence in (calls(signature, args, kwargs), *([(args, kwargs), call] for call in ones), strides):
        problem = differs(sequence)
        if problem is not None and sequence is strides and all(t.is_contiguous() for t in inputs):
            network.take_only("contiguous", model)
        elif problem is not None:
            return problem
    for prepared, mode in ((as_views, torch.no_grad), (clone, torch.inference_mode)):
        with mode():
            if problem := differs([(args, kwargs)], prepared):
                return problem
    for prepared in (as_parameters, as_results):
        if differs([(args, kwargs)], prepared) is not None:
            network.take_only("detached", model)
    return None


def _require_same(exported: Exported, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise NotExported if an export gives other values for the example. It is quick, and further exports are not."""
    with quiet():
        graph = fuse(lower(exported.program).graph)
    if not same_values(model, graph, exported.signature, [(args, kwargs)]):
        raise NotExported("the exported graph is not used: it gives other values")


def _exports(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[Exported]:
    """Export a model with its recurrent layers as single operations, and else as it stands."""
    limit = Limit(SECONDS)
    replaced = exportable(model)
    if replaced is not None:
        try:
            yield from exports(replaced, clone(args), clone(kwargs), limit)
        except NotExported:
            if not any(isinstance(module, nn.GRU | nn.LSTM) for module in model.modules()):
                raise
    yield from exports(model, clone(args), clone(kwargs), limit)


def _lowered(exported: Exported, model: nn.Module, args: tuple, kwargs: dict[str, Any], tune: bool) -> SparseModel:
    with quiet():
        lowered = lower(exported.program)
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    graph = fuse(lowered.graph)
    signature = with_sizes_of_zero(model, graph, exported.signature, args, kwargs)
    is_open = signature.holds_for_usual_sizes() and not takes_more(model, graph, signature, args, kwargs)
    return _tuned(graph, signature, inputs, lowered.left, tune, None if is_open else model)


def _tuned(
    graph: Graph, signature: Signature, inputs: list[Tensor], left: dict[str, str], tune: bool, source: nn.Module | None
) -> SparseModel:
    choices, quiet = choose(graph, try_out(graph, clone(inputs)), clone(inputs), library(), tune=tune)
    example = [tuple(tensor.shape) for tensor in inputs]
    return SparseModel(graph, signature, choices, left, [] if quiet else [BUSY], example, source)


def _compile_quantized(model: QuantizedModel, args: tuple, kwargs: dict[str, Any], tune: bool) -> SparseModel:
    """Compile a graph on integers, and compare it with torch's: equal, unless layers in float32 stand between."""
    inputs = model.signature.tensors(args, kwargs)
    network = _tuned(model.plain_graph(), model.signature, inputs, dict(model.left), tune, None)
    problem = integer_difference(model, network, calls(network.signature, args, kwargs))
    if problem is not None:
        raise RuntimeError(f"the compiled network differs from the quantized one: {problem}")
    return network


def _modulewise(model: nn.Module, args: tuple, kwargs: dict[str, Any], tune: bool, note: str) -> ModulewiseModel:
    """Compile layer by layer; where even that gives other values, torch executes all of them."""
    dense = _copied(model)
    left = left_to_torch(dense)
    inputs = layer_inputs(fresh(dense), clone(args), clone(kwargs))
    layers = {}
    for name, x in inputs.items():
        graph, signature = layer_graph(dense.get_submodule(name), name)
        try:
            layers[name] = _tuned(graph, signature, [x], {}, tune, None)
        except Exception as error:  # An input that only torch takes: torch executes the layer.
            left[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    network = ModulewiseModel(_copied(model), layers, left, [note])
    problem = difference(dense, network, [(args, kwargs)] * 2)
    if problem is None:
        return ModulewiseModel(_copied(model), layers, left, [note])
    left |= dict.fromkeys(layers, "the model gives other values with it compiled")
    return ModulewiseModel(_copied(model), {}, left, [note])


def _new_lock() -> None:
    """Replace the lock in a forked child: a thread of the parent may have held it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)
