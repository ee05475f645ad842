"""Write text with a trained language model: python rnn/generate.py RUN."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from str_triton.files import printable
from str_triton.programs import command
from str_triton.rnn.data.text import Vocabulary
from str_triton.rnn.finished_run import FinishedRun, open_run
from str_triton.rnn.models import LanguageModel
from str_triton.training.errors import UserError, run_program, warn
from str_triton.training.options import OptionParser

MAX_SEED = 2**63 - 1


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""

    def program() -> None:
        options = parser().parse_args(args)
        if options.length < 1:
            raise UserError(f"--length {options.length}: it must be at least 1")
        if not 0 <= options.temperature < math.inf:
            raise UserError(f"--temperature {options.temperature}: it must be 0 or more, and finite")
        if not 0 <= options.seed <= MAX_SEED:
            raise UserError(f"--seed {options.seed}: it must be in 0..{MAX_SEED}")
        torch.set_num_threads(1)  # for so small a network, a second thread costs more time than it saves
        run = open_run(options.run)
        if unknown := sorted(set(options.prompt) - set(run.outputs)):
            warn(f"--prompt has characters that the model does not know: {' '.join(map(repr, unknown))}")
        characters = generate(run, options.prompt or "\n", options.temperature, options.seed)
        print_safely(options.prompt)
        for _ in range(options.length):
            print_safely(next(characters))
        print()

    return run_program(program)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = OptionParser(
        prog=command("generate"),
        description="Write text with a trained language model, character by character.",
    )
    top.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    top.add_argument("--length", type=int, default=500, help="characters to write (default: 500)")
    top.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="divides the scores: 1 samples from the model's probabilities, a lower value prefers likely characters, "
        "0 always takes the most likely one (default: 0.8)",
    )
    top.add_argument("--seed", type=int, default=0, help="seed of the random choices (default: 0)")
    top.add_argument("--prompt", metavar="TEXT", default="", help="text to continue (default: the beginning of a line)")
    return top


def generate(run: FinishedRun, prompt: str, temperature: float, seed: int) -> Iterator[str]:
    """Return an endless iterator of the characters that follow ``prompt``, which must not be empty.

    Each step takes constant time and memory. The same arguments give the same characters on the same machine. Unknown
    characters of the prompt are read as the replacement character, which is never written.

    Raises `UserError` for a run that is not a language model.
    """
    if not isinstance(run.model, LanguageModel):
        raise UserError(f"{run.folder}: trained to classify {run.config['data']}; text needs a run with --task lm")
    return _sample(run.model, Vocabulary(run.outputs), prompt, temperature, torch.Generator().manual_seed(seed))


def _sample(
    model: LanguageModel, vocabulary: Vocabulary, prompt: str, temperature: float, generator: torch.Generator
) -> Iterator[str]:
    state = None
    for index in vocabulary.encode(prompt):
        scores, state = model.step(index[None], state)
    while True:
        scores = scores[0].double()
        scores[0] = -math.inf  # the replacement character
        if temperature == 0:
            index = scores.argmax()
        else:
            probabilities = ((scores - scores.max()) / temperature).softmax(0)
            index = torch.multinomial(probabilities, 1, generator=generator)[0]
        yield vocabulary.symbols[int(index)]
        scores, state = model.step(index[None], state)


def print_safely(text: str) -> None:
    """Print text with its line breaks and tabs. Other control characters are escaped: they would act on a terminal."""
    print("".join(c if c in "\n\t" else printable(c) for c in text), end="", flush="\n" in text)


if __name__ == "__main__":
    sys.exit(main())
