"""The networks that `compile_sparse` makes: called like the model that they were made from."""

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from str_triton.deploy.sparse import file
from str_triton.deploy.sparse.choose import choose
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Graph, Layer, State
from str_triton.deploy.sparse.graph.pointwise import Pointwise
from str_triton.deploy.sparse.graph.refs import Ref, references
from str_triton.deploy.sparse.graph.signature import Signature, Unfit
from str_triton.deploy.sparse.profile import profile
from str_triton.deploy.sparse.runtime.limits import TooLarge, require_memory
from str_triton.deploy.sparse.runtime.plan import Plan
from str_triton.deploy.sparse.runtime.segment import Mismatch
from str_triton.deploy.sparse.runtime.trial import dry_run, try_out
from str_triton.deploy.sparse.surroundings import context, is_watched, plain_torch, refuse_gradients, share_memory
from str_triton.deploy.sparse.text_table import text_table
from str_triton.files import percent
from str_triton.native.build import library

PLANS = 8  # input shapes whose buffers are kept; a further one replaces the oldest


class CompiledModel(nn.Module):
    """The base of compiled networks, which are for inference on the CPU in float32. `print` shows their executions.

    Attributes:
        left: the layers that torch executes unchanged, with the reason.
        notes: the lines that `print` shows after the table.
    """

    left: dict[str, str]
    notes: list[str]

    def train(self, mode: bool = True) -> "CompiledModel":
        if mode:
            raise ValueError("a network made by compile_sparse is for inference: train the model it was made from")
        return super().train(False)

    def __str__(self) -> str:
        return "\n".join([self.table(), *self.notes])

    def layers(self) -> Iterable[tuple[Layer, Choice]]:
        """Return the layers that this package executes, each with its execution."""
        raise NotImplementedError

    def table(self) -> str:
        """Return a line for each layer.

        A line has the sparsity of the weight, the execution, and two times in milliseconds for the example's shape,
        measured on the layer alone: of torch's fastest dense execution, and of the chosen execution.
        """
        rows = [("layer", "sparsity", "executed", "dense ms", "chosen ms")]
        for node, choice in self.layers():
            zeros = int((node.weight == 0).sum())
            sparsity = percent(zeros / node.weight.numel()) if node.weight.numel() else ""
            times = [f"{ms:.3f}" if ms is not None else "" for ms in (choice.ms_dense, choice.ms)]
            rows.append((node.label, sparsity, choice.execution, *times))
        rows += [(name, "", f"by torch: {reason}", "", "") for name, reason in self.left.items()]
        return text_table(rows)


class SparseModel(CompiledModel):
    """A network that runs from a plan, for arguments of any size that the export allows.

    The first call with a new input shape plans the buffers for it; the choices stay those for the example's shape.
    Several threads of Python may call one network: their calls run one after the other. The weights are not parameters
    and the state dict is empty, so store the network with `save` or torch.save.

    Args:
        graph: the network.
        signature: the arguments that it takes.
        choices: the execution of each layer.
        left, notes: as in CompiledModel.
        example: the shapes of the tensors that the choices were made for.
        source: the module that runs calls which the signature excludes; None: such calls raise.
    """

    def __init__(
        self,
        graph: Graph,
        signature: Signature,
        choices: dict[str, Choice],
        left: dict[str, str],
        notes: Sequence[str],
        example: Sequence[tuple[int, ...]],
        source: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.graph, self.signature, self.choices = graph, signature, choices
        self.left, self.notes, self.example = left, list(notes), list(example)
        self._held_source = (source,)  # not a submodule, so that .to() and the like do not change it
        self.training = False
        self.is_from_file = False
        self._prepare()

    @property
    def source(self) -> nn.Module | None:
        return self._held_source[0]

    def _prepare(self) -> None:
        """Create the attributes that copies and files leave out."""
        self._plans: dict[tuple, Plan] = {}
        self._lock = threading.Lock()
        self._tensors = [i for i, leaf in enumerate(self.signature.leaves) if leaf.dtype is not None]
        self._states = {node.name: node for node in self.graph.nodes if isinstance(node, State)}
        self._changes_inputs = not self.graph.changes.keys() <= self._states.keys()
        results = set(references(self.graph.outputs))
        self._gives_numbers = any(node.name in results and node.is_number for node in self.graph.nodes)
        self._number = next(_numbers)
        NETWORKS[self._number] = self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            leaves = self.signature.flatten(args, kwargs)
            outputs = self._as_operation(leaves) if is_watched() else self.run(leaves)
        except Unfit:
            if self.source is None or torch.compiler.is_compiling():
                raise  # Dynamo breaks the graph here, and calls the network outside of it.
            return self.by_source(*args, **kwargs)
        return pytree.tree_unflatten(outputs, self.signature.returns)

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the outputs, flat, for the leaves of a call's arguments."""
        with self._lock:
            plan = self._plan(leaves)
            inputs = [leaves[i] for i in self._tensors]
            with contextlib.nullcontext() if plan.by_kernels else context():
                try:
                    values = plan.run(inputs)
                except Mismatch:
                    return self._by_torch(inputs)
                outputs = [_output(value, values, plan.held) for value in self.graph.outputs]
                if self.graph.changes:
                    self._commit({name: values[ref.name] for name, ref in self.graph.changes.items()}, inputs)
        return outputs

    def _by_torch(self, inputs: list[Any]) -> list[Any]:
        """Return the outputs for inputs that fit no plan."""
        with context():
            outputs, changes = self.graph.run(inputs)
            self._commit(changes, inputs)
        return outputs

    def _commit(self, changes: dict[str, Tensor], inputs: list[Tensor]) -> None:
        places = {node.name: i for i, node in enumerate(self.graph.inputs())}
        for name, value in changes.items():
            if name in self._states:
                self._states[name].value = value.clone()
            else:
                inputs[places[name]].copy_(value)

    def by_source(self, *args: Any, **kwargs: Any) -> Any:
        """Let the model itself run a call that the network was not exported for, with the network's state."""
        with plain_torch(), self._lock:
            owners = {name: self.source.get_submodule(name.rpartition(".")[0]) for name in self.state()}
            for name, value in self.state().items():
                owners[name]._buffers[name.rpartition(".")[2]] = value.clone()
            result = self.source(*args, **kwargs)
            for node in self._states.values():
                node.value = owners[node.label]._buffers[node.label.rpartition(".")[2]].clone()
        return result

    def reset(self, buffers: dict[str, Tensor]) -> None:
        """Set the state from a model's buffers."""
        for node in self._states.values():
            node.value = buffers[node.label].detach().clone()

    def take_only(self, kind: str, source: nn.Module) -> None:
        """Let the model itself run calls with tensors that are not "contiguous", or not "detached"."""
        setattr(self.signature, kind, True)
        self._held_source = (source,)

    def retune(self) -> None:
        """Choose the executions again for the shapes of the example, on this machine."""
        dtypes = [leaf.dtype for leaf in self.signature.leaves if leaf.dtype is not None]
        inputs = [
            torch.zeros(shape, dtype=dtype, device="cpu") for shape, dtype in zip(self.example, dtypes, strict=True)
        ]
        with plain_torch(), self._lock:
            self.choices, _ = choose(self.graph, try_out(self.graph, inputs), inputs, library())
            self._plans.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the buffers that calls change, by their names in the model."""
        return {node.label: node.value for node in self._states.values()}

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Write the network with its choices to `path`: `load_sparse` reads it, `str-triton inspect` too.

        Args:
            metadata: further values for JSON; `deploy.inspect(path).metadata` returns them.

        Raises:
            ValueError: the network calls something that a file cannot hold; the message names it.
            OSError: the file cannot be written; `path` is as it was.
        """
        content = file.Content(self.graph, self.signature, self.choices, self.left, self.notes, self.example)
        file.write(path, content, metadata or {})

    def profile(self, *args: Any, **kwargs: Any) -> list[tuple[str, str, float]]:
        """Return the time of every step of such a call, measured one by one: (layer, kind, milliseconds).

        Kinds are "convolution", "depthwise", "linear", "recurrent", "pool", "pointwise" (sums, norms, activations and
        gates that are part of no other layer), "copy" (into and out of padded buffers, into the phases that strided
        layers read, and for concatenations and splits) and "torch".
        """
        leaves = self.signature.flatten(args, kwargs)
        inputs = [leaves[i].clone() for i in self._tensors]
        with plain_torch(), self._lock:
            return profile(self._plan(leaves), inputs)

    def layers(self) -> Iterable[tuple[Layer, Choice]]:
        shown = (node for node in self.graph.layers() if not isinstance(node, Pointwise))
        return ((node, self.choices[node.name]) for node in shown)

    def _plan(self, leaves: Sequence[Any]) -> Plan:
        """Return the plan for such inputs. The caller holds the lock.

        Raises ValueError where a network from a file would take memory beyond reason, or a tensor has no memory.
        """
        if self.signature.contiguous or self.signature.detached:
            self.signature.check(leaves)
        elif len(self._tensors) < len(leaves):
            self.signature.check_constants(leaves)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                require_memory(leaf)
        if self._changes_inputs and share_memory([leaves[i] for i in self._tensors]):
            raise Unfit("a call changes its arguments, and two of them share memory")
        key = tuple(
            (leaf.shape, leaf.dtype, leaf.device, leaf.layout) if isinstance(leaf, Tensor) else None for leaf in leaves
        )
        if key in self._plans:
            return self._plans[key]
        self.signature.check(leaves)
        if len(self._plans) == PLANS:
            del self._plans[next(iter(self._plans))]
        with context():
            inputs = [leaves[i] for i in self._tensors]
            # A file's network may allocate any power of these sizes. Torch refuses some empty tensors without values.
            if self.is_from_file and all(tensor.numel() for tensor in inputs):
                dry_run(self.graph, [tensor.shape for tensor in inputs], [tensor.dtype for tensor in inputs])
            try:
                trial = try_out(self.graph, inputs)
            except Exception as error:  # For one, a reshape to [-1, n] of no elements.
                if self.source is None:
                    raise
                raise Unfit(f"the exported graph does not run for these sizes: {error}") from error
            try:
                plan = Plan(self.graph, trial, self.choices, library())
            except TooLarge:
                plan = Plan(self.graph, trial, self.choices, None)
        self._plans[key] = plan
        return plan

    def _as_operation(self, leaves: Sequence[Any]) -> list[Any]:
        """Compute the outputs by one opaque operation, which tracers and dispatch modes can record."""
        self.signature.check_constants(leaves)
        if self._gives_numbers:
            raise Unfit("the network returns a size, which an operation of torch.compile cannot")
        tensors = [leaves[i] for i in self._tensors]
        if not torch.compiler.is_compiling():
            refuse_gradients(tensors)
        found = iter(torch.ops.str_triton.sparse_network(tensors, self._number))
        return [next(found) if isinstance(output, Ref) else output for output in self.graph.outputs]

    def __getstate__(self) -> dict[str, Any]:
        made = ("_plans", "_lock", "_tensors", "_states", "_changes_inputs", "_gives_numbers", "_number")
        return {key: value for key, value in vars(self).items() if key not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()


_numbers = itertools.count()
NETWORKS: "weakref.WeakValueDictionary[int, SparseModel]" = weakref.WeakValueDictionary()


def _output(value: Any, values: dict[str, Any], held: set[str]) -> Any:
    """Return an output of a call; a tensor that the network keeps is copied."""
    if not isinstance(value, Ref):
        return value
    found = values[value.name]
    return found.clone() if value.name in held and isinstance(found, Tensor) else found


def _new_locks() -> None:
    """Give networks new locks in a forked child: a thread of the parent may have held theirs."""
    for network in list(NETWORKS.values()):
        network._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_locks)
