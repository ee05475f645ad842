"""Export of a finished run to one C header and one C source."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from str_triton import LowRankRNN
from str_triton.files import write_atomically
from str_triton.rnn.c_export import template
from str_triton.rnn.c_export.stored import StoredMatrix, StoredVector, as_float32
from str_triton.rnn.finished_run import FinishedRun
from str_triton.rnn.models import SequenceClassifier

WEIGHTS = ("float32", "int8")
WIDTH = 120  # the maximum length of a line
RESERVED = ("math", "stddef", "stdint")  # a header of ours with one of these names would hide C's own
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
        stack: the arrays of the deepest call.
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
            f"code; RAM: {self.state:,} bytes of state, {self.stack:,} on the stack"
        )


def write_c(run: FinishedRun, folder: str | Path, *, weights: str = "float32") -> Sizes:
    """Write NAME.h and NAME.c to `folder`. NAME comes from the folder's name; a missing folder is made.

    weights: "float32" or "int8", see `StoredMatrix`. All arithmetic is float.

    Raises:
        ValueError: a language model, several bidirectional layers, unknown `weights`, weights that are not finite.
        OSError: the folder cannot be written.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if not isinstance(run.model, SequenceClassifier):
        raise ValueError(f"{run.folder} is a language model; only classifiers of feature vectors can be exported to C")
    if run.model.rnn.bidirectional and run.model.rnn.num_layers > 1:
        raise ValueError(
            f"{run.folder}: {run.model.rnn.num_layers} bidirectional layers; the second needs all outputs of the "
            "first, which a call per frame cannot provide: train with --layers 1 or without --bidirectional"
        )
    folder = Path(folder)
    name = identifier(folder)
    program = _Program(run, name, int8=weights == "int8")
    header, source = program.header(), program.source()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.h", header)
    write_atomically(folder / f"{name}.c", source)
    return program.sizes()


def identifier(folder: Path) -> str:
    """Return a C identifier from a folder's name, the prefix of the program's functions and files."""
    name = re.sub(r"[^0-9A-Za-z]+", "_", folder.resolve().name).strip("_").lower()
    return name if name[:1].isalpha() and name not in RESERVED else f"rnn_{name}".rstrip("_")


class _Program:
    """The C program of a run.

    Attributes:
        suffixes: the suffixes of the weights' names, by layer and then by direction.
        matrices, biases: the stored weights by their names in the source.
        mean: whether the classifier sees the mean of the outputs.
    """

    def __init__(self, run: FinishedRun, name: str, *, int8: bool) -> None:
        self.run, self.name, self.int8 = run, name, int8
        model, rnn = run.model, run.model.rnn
        self.rnn: LowRankRNN = rnn
        self.suffixes = [suffix for layer in range(rnn.num_layers) for suffix in rnn._suffixes(layer)]
        self.mean = model.pooling == "mean"
        self.matrices = {
            f"{kind}_{suffix}": StoredMatrix.of(getattr(rnn, f"weight_{short}_{suffix}"), int8=int8)
            for suffix in self.suffixes
            for kind, short in (("input", "ih"), ("hidden", "hh"))
        }
        self.matrices["classifier"] = StoredMatrix.of(model.classifier.weight, int8=int8)
        self.biases = {f"bias_{suffix}": StoredVector.of(_bias(rnn, suffix), int8=int8) for suffix in self.suffixes}
        self.biases["classifier_bias"] = StoredVector.of(as_float32(model.classifier.bias), int8=int8)

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
            features=_FEATURES[self.run.mean is None],
            ready=_READY[both],
            calls="\n".join(calls),
            classes="\n".join(f" *     {i}: {_comment(text)}" for i, text in enumerate(self.run.outputs)),
            inputs=self.rnn.input_size,
            outputs=len(self.run.outputs),
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
            sigmoid=template.SIGMOID,
            cell=cell.code,
            standardise="    const float *input = frame;\n" if self.run.mean is None else template.STANDARDISE,
            cell_state=", ".join(f"state->{name} + first" for name in cell.states),
            pool=template.POOL if self.mean else "",
            begin="".join(template.ZERO.substitute(field=field, count=count) for _, field, count in self._state()),
            pooled=template.POOLED_MEAN if self.mean else template.POOLED_LAST,
            step_back=template.STEP_BACK.substitute(named) if rnn.bidirectional else "",
        )

    def sizes(self) -> Sizes:
        arrays = list(self._arrays())
        weights = sum(values.nbytes for _, kind, values in arrays if kind == "weight")
        matrix, vector = (4 + self.int8) * POINTER, POINTER + 4 * self.int8
        scalars = 4 * len(self.rnn.scalars)
        records = len(self.suffixes) * (2 * matrix + vector + scalars) + matrix + vector
        rnn, pooled = self.rnn, 4 * (1 + self.rnn.bidirectional) * self.rnn.hidden_size * self.mean
        standardised = 4 * rnn.input_size * (self.run.mean is not None)
        return Sizes(
            weights=weights,
            tables=sum(values.nbytes for _, _, values in arrays) - weights + records,
            state=sum(4 * count for _, _, count in self._state()),
            stack=max(
                standardised + 4 * (2 * self._largest_rank() + rnn.hidden_size), 4 * len(self.run.outputs) + pooled
            ),
        )

    def _title(self) -> str:
        precision = "int8 weights" if self.int8 else "float32 weights"
        return _comment(f"{self.run.name}; {precision}; written by str-triton")

    def _state(self) -> list[tuple[str, str, int]]:
        """Return type, name and length of the state's arrays."""
        directions, hidden = 1 + self.rnn.bidirectional, self.rnn.hidden_size
        names = list(template.CELLS[self.rnn.cell].states)
        state = [("float", name, len(self.suffixes) * hidden) for name in names]
        if self.mean:
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
        if self.run.mean is not None:
            yield "mean", "float", as_float32(self.run.mean)
            yield "deviation", "float", as_float32(self.run.std)

    def _data(self) -> str:
        """Return the C definitions of the arrays, the layers and the classifier."""
        arrays = (_array(name, kind, values) for name, kind, values in self._arrays())
        layers = []
        for suffix in self.suffixes:
            fields = [
                self._record(f"input_{suffix}"),
                self._record(f"hidden_{suffix}"),
                self._bias_record(f"bias_{suffix}"),
            ]
            scalars = (getattr(self.rnn, f"{name}_{suffix}").sigmoid() for name in self.rnn.scalars)
            fields += [_number(as_float32(value).item()) for value in scalars]
            layers.append("    {\n" + "".join(f"        {field},\n" for field in fields) + "    },\n")
        text = f"static const layer layers[LAYERS * DIRECTIONS] = {{\n{''.join(layers)}}};\n"
        matrix = f"static const matrix classifier = {self._record('classifier')};\n"
        bias = f"static const vector classifier_bias = {self._bias_record('classifier_bias')};\n"
        return "".join(arrays) + text + matrix + bias

    def _bias_record(self, name: str) -> str:
        scale = self.biases[name].scale
        return f"{{{name}_values{'' if scale is None else f', {_number(scale)}'}}}"

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


def _array(name: str, kind: str, values: np.ndarray) -> str:
    """Return the C definition of a constant array, in lines of at most WIDTH characters."""
    lines, line = [], "   "
    for number in values.flatten().tolist():
        text = f" {number}," if values.dtype == np.int8 else f" {_number(number)},"
        if len(line) + len(text) > WIDTH:
            lines.append(line)
            line = "   "
        line += text
    lines.append(line)
    return f"static const {kind} {name}[{values.size}] = {{\n" + "\n".join(lines) + "\n};\n"


def _number(value: float) -> str:
    """Return a C float constant that reads back as the same float32."""
    text = f"{value:.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


def _comment(text: str) -> str:
    """Return text that is safe inside a C comment."""
    return re.sub(r"[^ -~]", "_", text).replace("*/", "* /").replace("/*", "/ *")
