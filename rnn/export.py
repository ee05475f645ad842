"""Export a finished run: python -m str_triton.rnn.export c|onnx|pack RUN OUT."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from str_triton import RankBudget, deploy
from str_triton.programs import command
from str_triton.rnn import listen, onnx_export
from str_triton.rnn.data import audio
from str_triton.rnn.finished_run import FinishedRun, open_run
from str_triton.training.errors import UserError, as_user_error, one_line, run_program, warn
from str_triton.training.interface import INTERFACE, Interface
from str_triton.training.options import OptionParser

WEIGHTS = ("float32", "int8")
STEPS = 99  # the frames of one second of speech
VALUES = ("float32", "float16", "bfloat16")


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""

    def program() -> None:
        options = parser().parse_args(args)
        with as_user_error(OSError, ValueError):
            options.export(options)

    return run_program(program)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = OptionParser(prog=command("export-rnn"), description="Export a finished run of a recurrent network.")
    targets = top.add_subparsers(title="targets", metavar="TARGET", required=True)

    def target(name: str, purpose: str, out: str, out_help: str) -> argparse.ArgumentParser:
        added = targets.add_parser(name, help=purpose, description=f"{purpose}.")
        added.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
        added.add_argument("out", metavar=out, type=Path, help=out_help)
        return added

    c = target(
        "c",
        "Write C99 for microcontrollers, without allocation: a function that takes one frame per call and, for speech, "
        "a function that spots words in samples",
        "DIR",
        "the folder for the files, whose names begin with the folder's name; made if missing",
    )
    c.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="float32",
        help="the type of the stored matrices and biases; int8 has a scale for each dense matrix, component and bias; "
        "the arithmetic is float (default: float32)",
    )
    c.set_defaults(export=export_c)
    onnx = target("onnx", "ONNX, checked with onnxruntime against torch", "OUT", "the .onnx file")
    length = onnx.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"the length of the input sequences (default: {STEPS})")
    length.add_argument("--streaming", action="store_true", help="a single step, with the state as input and output")
    onnx.set_defaults(export=export_onnx)
    pack = target(
        "pack", "A packed file with a checksum, and a model card (.md) next to it", "OUT", "the .safetensors file"
    )
    pack.add_argument(
        "--values", choices=VALUES, default="float32", help="the type that matrices are rounded to (default: float32)"
    )
    pack.set_defaults(export=export_pack)
    return top


def export_c(options: argparse.Namespace) -> None:
    """Write C for microcontrollers and print its sizes."""
    run = open_run(options.run)
    if run.config["task"] == "lm":
        raise UserError(f"{run.folder} is a language model; only classifiers of feature vectors can be exported to C")
    reason = listen.refusal(run)
    sizes = deploy.export_c(
        run.model,
        options.out,
        weights=options.weights,
        outputs=run.outputs,
        mean=run.mean,
        std=run.std,
        title=run.name,
        spotter=keyword_spotter() if reason is None else None,
    )
    print(f"{options.out}: C99, {options.weights} weights")
    print(sizes)
    if reason is not None:
        print(f"without a keyword spotter: {reason}")


def keyword_spotter() -> deploy.KeywordSpotter:
    """Return how rnn/listen.py listens."""
    return deploy.KeywordSpotter(
        rate=audio.RATE,
        window=audio.WINDOW,
        hop=audio.HOP,
        margin=audio.MARGIN,
        filters=audio.mel_filters(),
        floor=audio.FLOOR,
        frames=audio.FRAMES,
        stride=listen.STRIDE,
        smoothing=listen.SMOOTHING,
        threshold=listen.THRESHOLD,
        longest=listen.LONGEST,
        quiet=listen.QUIET,
        ignored=listen.IGNORED,
    )


def export_onnx(options: argparse.Namespace) -> None:
    """Write an ONNX model, after checking onnxruntime's scores against torch's."""
    steps = None if options.streaming else STEPS if options.steps is None else options.steps
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps}: at least 1")
    run = open_run(options.run)
    with as_user_error(ImportError):
        file = onnx_export.one_step(run) if steps is None else onnx_export.sequences(run, steps)
    file.save(options.out)
    form = "one step" if steps is None else f"sequences of {steps} steps"
    size, difference = len(file.content), file.difference
    print(f"{options.out}: {form}, {size:,} bytes; onnxruntime differs from torch by {difference:.1e} at most")


def export_pack(options: argparse.Namespace) -> None:
    """Write a packed file and its model card."""
    if options.out.suffix == ".md":
        raise UserError(f"{options.out}: the model card gets this name; give the packed file another suffix")
    run = open_run(options.run)
    facts = run_facts(run)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        budget = RankBudget.from_json(run.folder / "budget.json")
        metadata = {"run": facts, **Interface.read(run.folder / INTERFACE).record()}
        summary = deploy.pack(run.model, options.out, options.values, budget=budget, metadata=metadata)
    for remark in remarks:
        warn(str(remark.message))
    standardisation = ", and the mean and deviation of the inputs' standardisation"
    card = deploy.model_card(
        options.out,
        title=run.name,
        description="A recurrent network whose ranks were learned in training. The file's metadata hold the names of "
        f"the outputs{'' if run.mean is None else standardisation}.",
        facts=facts,
        code=card_code(run, options.out.name),
        pipeline_tag="text-generation" if run.config["task"] == "lm" else None,
    )
    print(summary)
    print(f"{options.out}, {card}")


def run_facts(run: FinishedRun) -> dict[str, str]:
    """Return the facts about the run for the model card; raise `UserError` if its summary.json is damaged."""
    path = run.folder / "summary.json"
    try:
        summary = json.loads(path.read_text())
        facts = {"data": run.config["data"], "recipe": summary["recipe"], "epochs": str(summary["epochs"])}
        if "accuracy" in summary:
            facts["accuracy"] = f"{100 * summary['accuracy']:.2f} % on the test set"
        if "bits_per_character" in summary:
            facts["bits per character"] = f"{summary['bits_per_character']:.4f} on the test set"
        return facts | {"parameters": f"{summary['params']:,} of {summary['dense_params']:,}"}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error


def card_code(run: FinishedRun, name: str) -> str:
    """Return Python code that loads the packed network in its compact form."""
    model, rnn = run.model, run.model.rnn
    lm = run.config["task"] == "lm"
    inputs = len(run.outputs) if lm else rnn.input_size
    options = {"layers": rnn.num_layers, "bidirectional": rnn.bidirectional}
    options |= {} if lm else {"pooling": model.pooling}
    numbers = inputs, len(run.outputs), rnn.hidden_size
    sizes = ", ".join([repr(rnn.cell), *map(str, numbers), *(f"{key}={value!r}" for key, value in options.items())])
    return f"""from str_triton.rnn.models import Architecture
from str_triton import deploy

architecture = Architecture({run.config["task"]!r}, {sizes})
model = architecture.build(ranks={rnn.ranks()})
model.load_state_dict(deploy.unpack({name!r}, factors=True))  # damaged bytes raise
model.eval()"""


if __name__ == "__main__":
    sys.exit(main())
