"""The header and the source of a recurrent classifier's C program."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from str_triton.deploy.c_export import template
from str_triton.deploy.c_export.stored import StoredMatrix, StoredVector, as_float32
from str_triton.deploy.c_export.text import array, comment, constant
from str_triton.deploy.recurrent_classifier import RecurrentClassifier
from str_triton.nn.recurrent import LowRankRNN

# Sentences of the header's comment. Index 1: the data are not standardised, or the network is bidirectional.
_FEATURES = (
    "the raw features, not standardised: the program subtracts the mean and divides by the deviation",
    "the raw features",
)
_READY = ("After any frame", "After both passes over the whole sequence")
POINTER = 4  # bytes of a pointer and of a size_t on a 32-bit processor


@dataclass(frozen=True)
class Sizes:
    """The sizes of the program's data in bytes on a 32-bit processor, without its instructions.

    Attributes:
        weights: matrices and biases.
        tables: scales, means, deviations and the records of the layers.
        state: the state of one sequence.
        stack: the arrays of the deepest call. The compiler's frames, which hold them, are larger.
    """

    weights: int
    tables: int
    state: int
    stack: int

    @property
    def flash(self) -> int:
        """Return the bytes of weights and tables."""
        return self.weights + self.tables

    def __str__(self) -> str:
        return (
            f"flash: {self.flash:,} bytes ({self.weights:,} of weights, {self.tables:,} of scales and tables) and the "
            f"code; RAM: {self.state:,} bytes of state, {stack_text(self.stack)}"
        )


def stack_text(arrays: int) -> str:
    """Return what is known of the stack, for people."""
    return f"{arrays:,} of arrays in the deepest call (its frames are larger: measure with -fstack-usage)"


class Program:
    """The C program of a recurrent classifier.

    Attributes:
        suffixes: the suffixes of the weights' names, by layer and then by direction.
        matrices, biases: the stored weights by their names in the source.
        pools_mean: whether the classifier sees the mean of the outputs.
    """

    def __init__(
        self,
        classifier: RecurrentClassifier,
        name: str,
        *,
        int8: bool,
        outputs: tuple[str, ...],
        mean: Tensor | None,
        std: Tensor | None,
        title: str,
    ) -> None:
        self.name, self.int8, self.outputs, self.title = name, int8, outputs, title
        self.standardisation = None if mean is None or std is None else (as_float32(mean), as_float32(std))
        rnn = self.rnn = classifier.rnn
        self.suffixes = [suffix for layer in range(rnn.num_layers) for suffix in rnn._suffixes(layer)]
        self.pools_mean = classifier.pooling == "mean"
        self.matrices = {
            f"{kind}_{suffix}": StoredMatrix.of(getattr(rnn, f"weight_{short}_{suffix}"), int8=int8)
            for suffix in self.suffixes
            for kind, short in (("input", "ih"), ("hidden", "hh"))
        }
        self.matrices["classifier"] = StoredMatrix.of(classifier.weight, int8=int8)
        self.biases = {f"bias_{suffix}": StoredVector.of(_bias(rnn, suffix), int8=int8) for suffix in self.suffixes}
        self.biases["classifier_bias"] = StoredVector.of(as_float32(classifier.bias), int8=int8)

    def header(self) -> str:
        both = self.rnn.bidirectional
        calls = [f" *     {self.name}_step(&state, frame); ... once for each frame, from the first to the last"]
        if both:
            calls.append(
                f" *     {self.name}_step_back(&state, frame); ... once for each frame, from the last to the first"
            )
        named = {"name": self.name, "guard": self.name.upper()}
        return template.HEADER.substitute(
            named,
            title=self._title(),
            features=_FEATURES[self.standardisation is None],
            ready=_READY[both],
            calls="\n".join(calls),
            classes="\n".join(f" *     {i}: {comment(text)}" for i, text in enumerate(self.outputs)),
            inputs=self.rnn.input_size,
            outputs=len(self.outputs),
            state="\n".join(f"    {kind} {field}[{count}];" for kind, field, count in self._state()),
            forward=", from the first to the last" if both else "",
            backward=template.BACKWARD_DECLARATION.substitute(named) if both else "",
        )

    def source(self) -> str:
        rnn, cell = self.rnn, template.CELLS[self.rnn.cell]
        named = {"name": self.name, "guard": self.name.upper()}
        component = "dot(m->inner + k * m->columns, x, m->columns)"
        return template.SOURCE.substitute(
            named,
            title=self._title(),
            hidden=rnn.hidden_size,
            layers=rnn.num_layers,
            directions=1 + rnn.bidirectional,
            max_rank=self._largest_rank(),
            weight="int8_t" if self.int8 else "float",
            scale_field="    const float *scale; /* one for each component, or one for a dense matrix */\n" * self.int8,
            vector_scale_field="    float scale;\n" * self.int8,
            vector_scale="v->scale * (float)" * self.int8,
            cell_fields="".join(f"    float {name}; /* after its sigmoid */\n" for name in rnn.scalars),
            data=self._data(),
            component=f"m->scale[k] * {component}" if self.int8 else component,
            row="m->inner == NULL ? m->scale[0] * sum : sum" if self.int8 else "sum",
            sigmoid=template.SIGMOID if "sigmoid(" in cell.code else "",
            cell=cell.code,
            standardise="    const float *input = frame;\n" if self.standardisation is None else template.STANDARDISE,
            cell_state=", ".join(f"state->{name} + first" for name in cell.states),
            pool=template.POOL if self.pools_mean else "",
            begin="".join(template.ZERO.substitute(field=field, count=count) for _, field, count in self._state()),
            pooled=template.POOLED_MEAN if self.pools_mean else template.POOLED_LAST,
            step_back=template.STEP_BACK.substitute(named) if rnn.bidirectional else "",
        )

    def products(self) -> tuple[int, int]:
        """Return the multiply-adds of one frame's matrices, and those of the scores."""
        counts = {
            name: matrix.rows.size + (0 if matrix.inner is None else matrix.inner.size)
            for name, matrix in self.matrices.items()
        }
        scores = counts.pop("classifier")
        return sum(counts.values()), scores

    def sizes(self) -> Sizes:
        arrays = list(self._arrays())
        weights = sum(values.nbytes for _, kind, values in arrays if kind == "weight")
        matrix, vector = (4 + self.int8) * POINTER, POINTER + 4 * self.int8
        scalars = 4 * len(self.rnn.scalars)
        records = len(self.suffixes) * (2 * matrix + vector + scalars) + matrix + vector
        rnn, pooled = self.rnn, 4 * (1 + self.rnn.bidirectional) * self.rnn.hidden_size * self.pools_mean
        standardised = 4 * rnn.input_size * (self.standardisation is not None)
        return Sizes(
            weights=weights,
            tables=sum(values.nbytes for _, _, values in arrays) - weights + records,
            state=sum(4 * count for _, _, count in self._state()),
            stack=max(standardised + 4 * (2 * self._largest_rank() + rnn.hidden_size), 4 * len(self.outputs) + pooled),
        )

    def _title(self) -> str:
        precision = "int8 weights" if self.int8 else "float32 weights"
        return comment(f"{self.title}; {precision}; written by str-triton")

    def _state(self) -> list[tuple[str, str, int]]:
        """Return type, name and length of the state's arrays."""
        directions, hidden = 1 + self.rnn.bidirectional, self.rnn.hidden_size
        names = list(template.CELLS[self.rnn.cell].states)
        state = [("float", name, len(self.suffixes) * hidden) for name in names]
        if self.pools_mean:
            state += [("float", name, directions * hidden) for name in ("total", "compensation")]
            state.append(("uint32_t", "steps", directions))
        return state

    def _largest_rank(self) -> int:
        return max(1, *(matrix.rank for matrix in self.matrices.values()))

    def _arrays(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield name, type and values of each array."""
        for name, matrix in self.matrices.items():
            for part, kind in (("rows", "weight"), ("inner", "weight"), ("scale", "float")):
                if (values := getattr(matrix, part)) is not None:
                    yield f"{name}_{part}", kind, values
        for name, bias in self.biases.items():
            yield f"{name}_values", "weight", bias.values
        if self.standardisation is not None:
            mean, deviation = self.standardisation
            yield "mean", "float", mean
            yield "deviation", "float", deviation

    def _data(self) -> str:
        """Return the C definitions of the arrays, the layers and the classifier."""
        arrays = (array(name, kind, values) for name, kind, values in self._arrays())
        layers = []
        for suffix in self.suffixes:
            fields = [
                self._record(f"input_{suffix}"),
                self._record(f"hidden_{suffix}"),
                self._bias_record(f"bias_{suffix}"),
            ]
            scalars = (getattr(self.rnn, f"{name}_{suffix}").sigmoid() for name in self.rnn.scalars)
            fields += [constant(as_float32(value).item()) for value in scalars]
            layers.append("    {\n" + "".join(f"        {field},\n" for field in fields) + "    },\n")
        text = f"static const layer layers[LAYERS * DIRECTIONS] = {{\n{''.join(layers)}}};\n"
        matrix = f"static const matrix classifier = {self._record('classifier')};\n"
        bias = f"static const vector classifier_bias = {self._bias_record('classifier_bias')};\n"
        return "".join(arrays) + text + matrix + bias

    def _bias_record(self, name: str) -> str:
        scale = self.biases[name].scale
        return f"{{{name}_values{'' if scale is None else f', {constant(scale)}'}}}"

    def _record(self, name: str) -> str:
        matrix = self.matrices[name]
        inner = "NULL" if matrix.inner is None else f"{name}_inner"
        scale = [] if matrix.scale is None else [f"{name}_scale"]
        columns = matrix.shape[1]
        return f"{{{', '.join([f'{name}_rows', inner, *scale, str(columns), str(matrix.rank or columns)])}}}"


def _bias(rnn: LowRankRNN, suffix: str) -> np.ndarray:
    """Return the biases of a layer in the order of its C cell; zeros where the layer has none."""
    none = np.zeros(rnn.gates * rnn.hidden_size, np.float32)
    biases = (as_float32(getattr(rnn, f"{name}_{suffix}")) if rnn.bias else none for name in rnn.biases)
    return template.CELLS[rnn.cell].bias(*(bias.reshape(rnn.gates, -1) for bias in biases)).flatten()
