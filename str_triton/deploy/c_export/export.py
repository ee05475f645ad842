"""The export of a recurrent classifier to C99 for microcontrollers."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from str_triton.deploy.c_export.program import Program, Sizes
from str_triton.deploy.c_export.spotter import KeywordSpotter, SpotterProgram, SpotterSizes
from str_triton.deploy.recurrent_classifier import RecurrentClassifier
from str_triton.files import write_atomically

WEIGHTS = ("float32", "int8")
# A header of ours with the name of one of C's would hide it from programs that search the folder (-I).
RESERVED = (
    "assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdarg stdbool stddef "
    "stdint stdio stdlib string tgmath time wchar wctype"
)


def export_c(
    module: nn.Module,
    folder: str | Path,
    *,
    weights: str = "float32",
    outputs: Sequence[str] | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    title: str | None = None,
    spotter: KeywordSpotter | None = None,
) -> Sizes | SpotterSizes:
    """Write a recurrent classifier as NAME.h and NAME.c to `folder`, C99 without allocation, one call per frame.

    NAME comes from the folder's name; a missing folder is made. All arithmetic is float.

    Args:
        module: a module with one LowRankGRU, LowRankLSTM, LowRankFastGRNN, nn.GRU or nn.LSTM, and one nn.Linear that
            scores its last states or the mean of its outputs. The layer is compacted; the module does not change.
        weights: "float32" or "int8", see `StoredMatrix`.
        outputs: the names of the classes, for the header; by default their numbers.
        mean, std: [inputs]; the program standardises its inputs, (frame - mean) / std. None: it does not.
        title: a line about the network for the files.
        spotter: for a classifier of sound, how it listens: NAME_spotter.h and NAME_spotter.c find words in samples, and
            demo/main.c finds them in a WAV file. Without it a folder that holds such files is refused.

    Raises:
        ValueError: another module (the message names it), several bidirectional layers, unknown `weights`, weights
            that are not finite, names or a standardisation of the wrong size.
        FileExistsError: the folder holds the spotter of another network, and this one has none.
        OSError: the folder cannot be written.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    classifier = RecurrentClassifier.of(module)
    rnn, classes = classifier.rnn, len(classifier.bias)
    if rnn.bidirectional and rnn.num_layers > 1:
        raise ValueError(
            f"{type(module).__name__} has {rnn.num_layers} bidirectional layers; the second needs all outputs of the "
            "first, which a call per frame cannot provide: use one layer, or layers of one direction"
        )
    names = tuple(map(str, range(classes) if outputs is None else outputs))
    if len(names) != classes:
        raise ValueError(f"outputs has {len(names)} names for {classes} classes")
    _check_standardisation(mean, std, rnn.input_size)
    folder = Path(folder)
    name = identifier(folder)
    if title is None:
        title = f"{type(rnn).__name__.removeprefix('LowRank')} of {rnn.hidden_size} units"
    program = Program(classifier, name, int8=weights == "int8", outputs=names, mean=mean, std=std, title=title)
    files = {f"{name}.h": program.header(), f"{name}.c": program.source()}
    sizes: Sizes | SpotterSizes = program.sizes()
    ears = f"{name}_spotter.h", f"{name}_spotter.c"
    if spotter is not None:
        ear = SpotterProgram(spotter, program)
        files |= {ears[0]: ear.header(), ears[1]: ear.source(), "demo/main.c": ear.demo()}
        sizes = ear.sizes()
    elif old := [file for file in ears if (folder / file).exists()]:
        raise FileExistsError(
            f"{folder} holds the spotter of another network ({', '.join(old)}), and this network has none: remove the "
            "files of that export, or name another folder"
        )
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / file, content)
    return sizes


def _check_standardisation(mean: Tensor | None, std: Tensor | None, inputs: int) -> None:
    """Raise ValueError or TypeError unless both are given, or neither, with a value for each input."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: give both or neither")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
        if values is not None and values.shape != (inputs,):
            raise ValueError(f"{name} must have shape [{inputs}], got {list(values.shape)}")
    if std is not None and not bool((std > 0).all()):
        raise ValueError("std must be positive")


def identifier(folder: Path) -> str:
    """Return a C identifier from a folder's name, the prefix of the program's functions and files."""
    name = re.sub(r"[^0-9A-Za-z]+", "_", folder.resolve().name).strip("_").lower()
    return name if name[:1].isalpha() and name not in RESERVED.split() else f"rnn_{name}".rstrip("_")
