"""Hear words in sound as it comes: python rnn/listen.py RUN [FILE.wav], or sound on standard input."""

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from rnn.data.audio import FRAMES, HOP, RATE
from rnn.data.clips import SILENCE, UNKNOWN
from rnn.data.sound_stream import LogMelStream, read_chunks
from rnn.finished_run import FinishedRun, open_run
from rnn.one_line_parser import OneLineParser
from str_triton.training.errors import UserError, as_user_error, run_program

PROGRAM = "python rnn/listen.py"
SPEECH = ("speech-commands", "hub", "spoken")  # kinds of data whose features are log-mels
STRIDE = 10  # frames from one window's begin to the next one's
SMOOTHING = 5  # windows whose probabilities are averaged
THRESHOLD = 0.6  # of a word's averaged probability
LONGEST = 20  # windows after which a word is said though it still lasts
QUIET = 0.03  # energy of a frame of noise at -60 dB of the loudest: a window of nothing else is silence


class Heard(NamedTuple):
    """A word, the largest of its averaged probabilities, and where: seconds from the beginning to its middle, about."""

    seconds: float
    word: str
    probability: float


class Listener:
    """The words in sound that comes piece by piece, in constant memory.

    The network was trained on clips of a second, from a state of zeros. So a window of 99 frames begins every 100 ms;
    ten of them are under way at any time, a batch for the network's `step`, and each in turn ends with its scores. The
    probabilities of five windows are averaged; a word is heard where its average is 0.6 or more. It is said once, when
    that ends or has lasted for two seconds: the weighted mean of those windows' middles is its time. The classes
    silence and unknown are no words, and where all is quiet there is none either.

    Args:
        run: of a classifier of speech, in one direction.

    Raises:
        ValueError: a run of another kind.
    """

    def __init__(self, run: FinishedRun) -> None:
        if run.config["task"] != "classify" or run.config["data"].partition(":")[0] not in SPEECH:
            raise ValueError(f"{run.folder}: trained on {run.config['data']}, which is no speech")
        if run.mean is None:
            raise ValueError(f"{run.folder}: its interface.json has no standardisation, which sound takes")
        if run.model.rnn.bidirectional:
            raise ValueError(f"{run.folder}: a bidirectional network needs the end of the sound before it can begin")
        self.run, self.model = run, run.model
        self.windows = -(-FRAMES // STRIDE)
        self._features = LogMelStream()
        self._frames = 0
        self._state: Tensor | tuple[Tensor, Tensor] | None = None
        self._total = torch.zeros(self.windows, run.model.rnn.hidden_size)
        self._loud: deque[bool] = deque(maxlen=FRAMES)
        self._recent: deque[Tensor] = deque(maxlen=SMOOTHING)
        self._word: str | None = None
        self._places: list[tuple[float, float]] = []  # middle and averaged probability of the word's windows

    def __call__(self, samples: Tensor) -> Iterator[Heard]:
        """int16 [any] at 16 kHz: what was heard by the end of it."""
        for frame in self._features(samples):
            probabilities = self._advance(frame)
            if probabilities is not None:
                yield from self._decide(probabilities)

    def end(self) -> Iterator[Heard]:
        """The sound is over: what was being heard."""
        if self._word is not None and len(self._places) < LONGEST:
            yield self._heard()

    @torch.no_grad()
    def _advance(self, frame: Tensor) -> Tensor | None:
        """Go on by a frame of features [32]; the probabilities [classes] of the window that it ends, if it does."""
        self._loud.append(bool(frame.exp().sum() > QUIET))
        window, rest = divmod(self._frames, STRIDE)
        if rest == 0:
            self._begin(window % self.windows)
        x = ((frame - self.run.mean) / self.run.std).expand(self.windows, -1)
        output, self._state = self.model.rnn.step(x, self._state)
        self._total += output
        self._frames += 1
        window, rest = divmod(self._frames - FRAMES, STRIDE)
        if window < 0 or rest != 0:
            return None
        place = window % self.windows
        pooled = self._total[place] / FRAMES if self.model.pooling == "mean" else output[place]
        return self.model.classifier(pooled).softmax(0)

    def _begin(self, place: int) -> None:
        """Begin a window in the batch's row ``place``."""
        self._total[place] = 0
        for state in self._state if isinstance(self._state, tuple) else (self._state,):
            if state is not None:
                state[:, place] = 0

    def _decide(self, probabilities: Tensor) -> Iterator[Heard]:
        self._recent.append(probabilities)
        average = torch.stack(tuple(self._recent)).sum(0) / SMOOTHING
        probability, number = average.max(0)
        word = self.run.outputs[int(number)]
        if probability < THRESHOLD or word in (SILENCE, UNKNOWN) or not any(self._loud):
            word = None
        if word != self._word:
            yield from self.end()
            self._word, self._places = word, []
        if word is not None:
            middle = self._frames - (FRAMES + (SMOOTHING - 1) * STRIDE) / 2
            self._places.append((middle * HOP / RATE, float(probability)))
            if len(self._places) == LONGEST:
                yield self._heard()

    def _heard(self) -> Heard:
        weight = sum(probability for _, probability in self._places)
        seconds = sum(seconds * probability for seconds, probability in self._places) / weight
        return Heard(seconds, self._word, max(probability for _, probability in self._places))


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: those of the command line) and return its exit code."""

    def program() -> None:
        options = parser().parse_args(args)
        with as_user_error(OSError, ValueError), opened(options.file) as (stream, name):
            listen(Listener(open_run(options.run)), read_chunks(stream, name, options.rate))

    return run_program(program)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = OneLineParser(
        prog=PROGRAM,
        description="Print the words in sound as it comes, each with its time, by a network that rnn/train.py trained "
        "on speech. The sound has 16 bits, one channel and 16,000 samples a second.",
        epilog="for example: arecord -f S16_LE -r 16000 -c 1 | python rnn/listen.py runs/spoken-gru. A network without "
        "the class silence (--data spoken:...) names words in noise too.",
    )
    top.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    top.add_argument("file", metavar="FILE", type=Path, nargs="?", help="a WAV file (default: standard input)")
    top.add_argument("--rate", type=int, help="the sound is bare samples without a WAV header, of this rate: 16000")
    return top


@contextlib.contextmanager
def opened(file: Path | None) -> Iterator[tuple[BinaryIO, str]]:
    """The stream and its name in messages."""
    if file is None:
        if sys.stdin.isatty():
            raise UserError("no sound on standard input: name a file, or pipe a recording in")
        yield sys.stdin.buffer, "standard input"
    else:
        with file.open("rb") as stream:
            yield stream, str(file)


def say(heard: Iterable[Heard]) -> None:
    """Print words."""
    for seconds, word, probability in heard:
        print(f"{seconds:8.1f} s  {word}  {probability:.0%}", flush=True)


def listen(listener: Listener, sound: Iterator[Tensor]) -> None:
    """Print what is heard until the sound ends or the person at the keyboard ends it, and how long it took."""
    torch.set_num_threads(1)  # the network is so small that a second thread costs more than it gives
    samples, busy = 0, 0.0
    with contextlib.suppress(KeyboardInterrupt):
        for piece in sound:
            begin = time.perf_counter()
            heard = list(listener(piece))
            busy += time.perf_counter() - begin
            samples += len(piece)
            say(heard)
    say(listener.end())
    factor = busy * RATE / max(samples, 1)
    print(
        f"{samples / RATE:.1f} s of sound; a window of 1 s takes {1000 * factor:.0f} ms: real-time factor {factor:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
