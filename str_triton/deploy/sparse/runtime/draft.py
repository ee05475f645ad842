"""The tasks of a plan, in order: the form of every value, and the copies that change it."""

import math

from str_triton.deploy.sparse.executions import EXECUTIONS
from str_triton.deploy.sparse.executions.choice import Choice
from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Graph, Layer, Linear, Node, Pair
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool, Mean
from str_triton.deploy.sparse.graph.quantized import (
    Dequantize,
    Quantize,
    QuantizedConvolution,
    QuantizedGate,
    QuantizedLinear,
    QuantizedMean,
    grids_of_codes,
)
from str_triton.deploy.sparse.graph.refs import Ref
from str_triton.deploy.sparse.runtime.buffers import Key
from str_triton.deploy.sparse.runtime.images import (
    MOST_PHASES,
    Channels,
    Gate,
    Parts,
    has_window,
    image_operation,
    is_row,
    padded_image,
    reshaped,
)
from str_triton.deploy.sparse.runtime.layout import PIXEL, PLAIN, Window
from str_triton.deploy.sparse.runtime.tasks import Task
from str_triton.deploy.sparse.runtime.trial import Trial
from str_triton.deploy.sparse.runtime.windows import windows

NOT_NEGATIVE = ("sigmoid", "hardsigmoid")


class Draft:
    """The form of every value, and the list of the tasks."""

    def __init__(self, graph: Graph, trial: Trial, choices: dict[str, Choice], kernels: bool) -> None:
        self.shapes, self.codes, self.choices, self.kernels = trial.shapes, trial.codes, choices, kernels
        self.zeros = {name: grid.zero for name, grid in grids_of_codes(graph.nodes).items()}
        self.nodes = {node.name: node for node in graph.nodes}
        self.images: set[str] = set()  # Values that lie in padded buffers as images of a batch.
        self._written: set[str] = set()  # Values that a kernel makes in padded buffers.
        for node in graph.nodes:
            if self._makes_image(node):
                self._written.add(node.name)
        self.pads = self._pads(graph, trial)
        self.windows = windows(graph, self._written, self.pads, trial, self._needs_copy)
        self.tasks: list[Task] = []
        self._made: set[Key | str] = set()
        for node in graph.nodes:
            if node.name not in trial.fixed:
                self._add(node)
        for name in graph.kept():
            self._tensor(name)

    def _by_kernels(self, node: Layer) -> bool:
        execution = EXECUTIONS[self.choices[node.name].execution]
        return self.kernels and execution.by_kernels and execution.fits(node, self.shapes)

    def _makes_image(self, node: Node) -> bool:
        """Check whether kernels compute this node from an image to an image."""
        match node:
            case Quantize():
                return self.kernels and self._are_images(node.name) and self._reads_its_kind(node)
            case QuantizedConvolution():
                own = node.output_shape(self.codes[node.inputs[0]]) if self._are_images(*node.inputs, node.name) else ()
                fits = math.prod(node.stride) <= MOST_PHASES and self._by_kernels(node)
                return (
                    fits and all(self.codes[name] == own for name in (node.name, *node.inputs[1:]) if own) and own != ()
                )
            case QuantizedLinear():
                return False
            case QuantizedGate():
                image, factors = node.inputs
                fits = self._are_images(image, node.name) and self.codes[image] == self.codes[node.name]
                return fits and self._is_image(image) and self.shapes.get(factors) == (*self.codes[image][:2], 1, 1)
            case Convolution():
                fits = math.prod(node.stride) <= MOST_PHASES and self._by_kernels(node)
                return fits and not is_row(node, self.shapes)
            case Linear():
                return self._by_kernels(node) and not is_row(node, self.shapes)
            case MaxPool() | AvgPool():
                return self._is_image(node.inputs[0]) and has_window(node, self.shapes)
        match self.kernels and image_operation(node, self._kind(node)):
            case Gate(image, _) | Channels(image, _):
                return self._is_image(image)
            case Parts(images):
                return any(map(self._is_image, images))
        return False

    def _are_images(self, *names: str) -> bool:
        """Check that values are codes of images, and none is empty."""
        return all(len(self.codes.get(name, ())) == 4 and 0 not in self.codes[name] for name in names)

    def _reads_its_kind(self, node: Node) -> bool:
        """Check that a node reads codes if it is for codes, and else float32. In a file it may read either."""
        return node.inputs[0] in (self.codes if isinstance(node, Dequantize | QuantizedMean) else self.shapes)

    def _codes_rows(self, node: Quantize | Dequantize) -> bool:
        """Check that a kernel makes codes of a tensor, or a tensor of codes, in the tensor's own form."""
        shape = self._kind(node).get(node.name, (0,))
        return self.kernels and self._reads_its_kind(node) and len(shape) == 2 and 0 not in shape

    def _kind(self, node: Node) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the values of a node's kind: codes, or float32."""
        return self.codes if node.name in self.codes else self.shapes

    def _reads_border(self, node: Node) -> bool:
        """Check whether a max pool reads around an image in which a number may be less than the zeros there."""
        if not isinstance(node, MaxPool) or node.name in self.codes or (node.padding == (0, 0) and not node.ceil):
            return False
        producer = self.nodes[node.inputs[0]]
        return not isinstance(producer, Layer) or (producer.clamp[0] < 0 and producer.activation not in NOT_NEGATIVE)

    def _is_image(self, name: str) -> bool:
        """Check whether a kernel makes this value, and not in turned form."""
        return name in self._written and not isinstance(self.nodes[name], Linear)

    def _pads(self, graph: Graph, trial: Trial) -> dict[str, tuple[str, Pair]]:
        """Return the calls that put zeros around an image only for convolutions: image, rows above and columns left.

        These convolutions read the zeros around the image itself.
        """
        readers, kept, found = graph.readers(), set(graph.kept()), {}
        for node in graph.nodes:
            zero = self.zeros.get(node.inputs[0], 0) if node.inputs else 0
            image = padded_image(node, self._kind(node), zero)
            if image is None or node.name in kept or 0 in self._kind(node).get(image, (0,)):
                continue
            zeros = [trial.fixed.get(size.name) if isinstance(size, Ref) else size for size in node.args[1]]
            usual = all(isinstance(size, int) and size >= 0 for size in zeros)
            if usual and all(self._reads_zeros(reader, node.name) for reader in readers[node.name]):
                left, _, above, _ = [*zeros, 0, 0, 0, 0][:4]
                found[node.name] = image, (above, left)
        return found

    def _reads_zeros(self, node: Node, name: str) -> bool:
        """Check whether a node is a convolution by the kernels that reads a value through its window alone."""
        is_window = isinstance(node, Convolution) and node.name in self._written
        return is_window and node.inputs[0] == name and name not in node.inputs[1:]

    def _add(self, node: Node) -> None:
        if node.name in self.pads:
            return
        if node.name in self._written and isinstance(node, Call):
            self._add_call(node)
        elif node.name in self._written and isinstance(node, Quantize):
            writes = self._own(node.name)
            self._tensor(*node.inputs)
            self._note(writes)
            self.tasks.append(Task("quantize", node, [], writes, list(node.inputs), value=node.name))
            self._made.add(writes)
        elif node.name in self._written and isinstance(node, QuantizedGate):
            self._add_gate(node, *node.inputs)
        elif isinstance(node, Dequantize) and self._is_image(node.inputs[0]) and self._reads_its_kind(node):
            source = self._image(self._key(node.inputs[0], PLAIN))
            self.tasks.append(Task("dequantize", node, [source], makes=node.name, value=node.name))
        elif node.name in self._written:
            window, writes = self.windows[node.name], self._own(node.name)
            reads = [self._image(self._read(node, window, writes.turned))]
            reads += [self._image(self._key(name, window.phases)) for name in node.inputs[1:]]
            self._note(writes)
            self.tasks.append(Task("window", node, reads, writes, window=window))
            self._made.add(writes)
        elif isinstance(node, Quantize | Dequantize) and self._codes_rows(node):
            self._tensor(*node.inputs)
            kind = "quantize" if isinstance(node, Quantize) else "dequantize"
            self.tasks.append(Task(kind, node, tensors=node.inputs[:1], makes=node.name, value=node.name))
        elif isinstance(node, Mean) and self._is_image(node.inputs[0]) and self._reads_its_kind(node):
            self.tasks.append(Task("mean", node, [self._image(self._key(node.inputs[0], PLAIN))], makes=node.name))
        elif isinstance(node, Layer) and self._by_kernels(node) and self._multiplies_rows(node):
            self._tensor(node.inputs[0])
            self.tasks.append(Task("linear", node, tensors=node.inputs[:1], makes=node.name))
        else:
            for name in node.inputs:
                self._tensor(name)
            source = reshaped(node, self._kind(node))
            kind, reads = ("reshape", [source]) if source else ("torch", list(node.inputs))
            self.tasks.append(Task(kind, node, tensors=reads, makes=node.name))

    def _add_gate(self, node: Node, image: str, factors: str) -> None:
        writes = self._own(node.name)
        self._note(writes)
        self._tensor(factors)
        source = self._image(self._key(image, PLAIN))
        self.tasks.append(Task("gate", node, [source], writes, [factors], window=PIXEL))
        self._made.add(writes)

    def _add_call(self, node: Call) -> None:
        """Add the tasks that stand for one of torch's operations on images."""
        writes = self._own(node.name)
        self._note(writes)
        match image_operation(node, self._kind(node)):
            case Gate(image, factors):
                self._add_gate(node, image, factors)
            case Channels(image, begin):
                source = [self._image(self._key(image, PLAIN))]
                self.tasks.append(Task("copy", node, source, writes, value=node.name, skipped=(begin, 0)))
            case Parts(images):
                begin = 0
                for name in images:
                    source, tensors = (
                        ([self._image(self._key(name, PLAIN))], []) if self._is_image(name) else ([], [name])
                    )
                    self._tensor(*tensors)
                    self.tasks.append(Task("copy", node, source, writes, tensors, value=name, skipped=(0, begin)))
                    begin += self._kind(node)[name][1]
        self._made.add(writes)

    def _own(self, name: str) -> Key:
        """Return the form in which a kernel makes a value."""
        return self._key(name, self.windows[name].phases, isinstance(self.nodes[name], Linear))

    def _key(self, name: str, phases: tuple[int, int], turned: bool = False) -> Key:
        """Return a form of a value, with the border that its kernel writes."""
        return Key(name, phases, turned, fill=self.zeros.get(name, 0))

    def _read(self, node: Layer | MaxPool | AvgPool, window: Window, turned: bool) -> Key:
        """Return the form in which a window reads its input, with the border that it expects."""
        is_padded = node.inputs[0] in self.pads
        image = self.pads[node.inputs[0]][0] if is_padded else node.inputs[0]
        key = self._key(image, window.reads, turned)._replace(bordered=self._reads_border(node))
        if isinstance(node, QuantizedConvolution) and (node.padding != (0, 0) or is_padded):
            return key._replace(fill=node.grids[0].zero)
        if isinstance(node, MaxPool) and node.name in self.codes and (node.padding != (0, 0) or node.ceil):
            return key._replace(fill=0)
        return key

    def _needs_copy(self, node: Layer | MaxPool | AvgPool) -> bool:
        """Check whether a window expects another border than its input is made with."""
        key = self._read(node, PIXEL, False)
        return key != self._key(key.value, PLAIN)

    def _multiplies_rows(self, node: Layer) -> bool:
        """Check that a layer has a kernel for single rows: of codes, or of float32."""
        if isinstance(node, QuantizedLinear):
            shape = self.codes.get(node.inputs[0], ())
            return len(shape) == 2 and 0 not in shape and self.shapes.get(node.name) == (shape[0], len(node.weight))
        return node.name in self.shapes and is_row(node, self.shapes)

    def _note(self, key: Key) -> None:
        if not key.turned:
            self.images.add(key.value)

    def _image(self, key: Key) -> Key:
        """Make a value available in this form, by a copy if necessary, and return the form."""
        self._note(key)
        if key in self._made:
            return key
        name = key.value
        made = self._own(name) if name in self._written else None
        if made is None or made.turned != key.turned:
            self._tensor(name)
            self.tasks.append(Task("copy", self.nodes[name], [], key, [name], value=name))
        else:
            if PLAIN not in (made.phases, key.phases):
                made = self._image(Key(name, PLAIN))
            self.tasks.append(Task("copy", self.nodes[name], [made], key, value=name))
        self._made.add(key)
        return key

    def _tensor(self, *names: str) -> None:
        """Make values available as torch's tensors."""
        for name in names:
            if name in self._written and name not in self._made:
                source = self._own(name)
                self.tasks.append(Task("copy", self.nodes[name], [source], makes=name, value=name))
                self._made.add(name)
