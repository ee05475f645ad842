"""Spot words in a stream of sound: python rnn/listen.py RUN [FILE.wav], or sound on standard input."""

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

from str_triton.programs import command
from str_triton.rnn.data.audio import FRAMES, HOP, MARGIN, RATE, WINDOW
from str_triton.rnn.data.clips import SILENCE, UNKNOWN
from str_triton.rnn.data.sound_stream import LogMelStream, pieces
from str_triton.rnn.finished_run import FinishedRun, open_run
from str_triton.training.errors import UserError, as_user_error, run_program
from str_triton.training.options import OptionParser

SPEECH = ("speech-commands", "hub", "spoken")  # the kinds of data with log-mel features
SHORTEST = (FRAMES - 1) * HOP + WINDOW - MARGIN  # samples of a window; `LogMel` completes a clip with zeros to so many
STRIDE = 10  # frames between the beginnings of two windows
SMOOTHING = 5  # windows whose probabilities are averaged
THRESHOLD = 0.6  # the averaged probability at which a word is detected
LONGEST = 20  # windows after which a word is reported even though it still lasts
IGNORED = (SILENCE, UNKNOWN)  # classes that are never reported
QUIET = 0.03  # energy of a frame of noise at -60 dB of full scale; a window of quieter frames only is silent


def refusal(run: FinishedRun) -> str | None:
    """Return why a run's network cannot listen; None if it can."""
    if run.config["task"] != "classify" or run.config["data"].partition(":")[0] not in SPEECH:
        return f"trained on {run.config['data']}, which is not speech"
    if run.mean is None:
        return "its interface.json has no standardisation, which sound needs"
    if run.model.rnn.bidirectional:
        return "a bidirectional network needs the end of the sound before it can start"
    return None


class Detection(NamedTuple):
    """A detected word: the time of its middle in seconds (approximate), the word, and its largest probability."""

    seconds: float
    word: str
    probability: float


class Listener:
    """A word spotter for a stream of sound, in constant memory.

    The network was trained on clips of one second that start from a zero state. So a window of 99 frames begins every
    100 ms. Ten windows overlap at any time; they are one batch for the network's `step`, and each window ends with
    scores. The probabilities of five windows are averaged. A word is detected while its average is 0.6 or more. It is
    reported once, when the detection ends or has lasted two seconds. The reported time is the mean of the windows'
    middles, weighted by probability. The classes silence and unknown are never reported, nor is anything in silence.

    A sound that ends before the first window is complete is padded with silence, as clips are in training. If it ends
    before the fifth, the average is that of the windows so far.

    Args:
        run: a run of a speech classifier that is not bidirectional.

    Attributes:
        frames: the frames of features so far.

    Raises:
        ValueError: a run of another kind.
    """

    def __init__(self, run: FinishedRun) -> None:
        if (reason := refusal(run)) is not None:
            raise ValueError(f"{run.folder}: {reason}")
        self.run, self.model = run, run.model
        self.windows = -(-FRAMES // STRIDE)
        self._features = LogMelStream()
        self.frames = 0
        self._samples = 0
        self._state: Tensor | tuple[Tensor, Tensor] | None = None
        self._total = torch.zeros(self.windows, run.model.rnn.hidden_size)
        self._loud: deque[bool] = deque(maxlen=FRAMES)
        self._recent: deque[Tensor] = deque(maxlen=SMOOTHING)
        self._word: str | None = None
        self._word_windows: list[tuple[float, float]] = []  # middle and averaged probability of the word's windows

    def __call__(self, samples: Tensor) -> Iterator[Detection]:
        """Process the next samples, int16 [any] at 16 kHz, and yield the detections that are complete."""
        self._samples += len(samples)
        for frame in self._features(samples):
            probabilities = self._advance(frame)
            if probabilities is not None:
                yield from self._decide(probabilities)

    def end(self) -> Iterator[Detection]:
        """Yield the detections that the end of the sound completes, if any."""
        if self._samples < SHORTEST:
            yield from self(torch.zeros(SHORTEST - self._samples, dtype=torch.int16))
        if len(self._recent) < SMOOTHING:
            yield from self._judge(len(self._recent))
        yield from self._end_word()

    def _end_word(self) -> Iterator[Detection]:
        """Yield the detection of the word that lasted until now, if any was not reported yet."""
        if self._word is not None and len(self._word_windows) < LONGEST:
            yield self._detection()

    @torch.no_grad()
    def _advance(self, frame: Tensor) -> Tensor | None:
        """Process a frame of features [32]; return the probabilities [classes] if it ends a window, else None."""
        self._loud.append(bool(frame.exp().sum() > QUIET))
        window, rest = divmod(self.frames, STRIDE)
        if rest == 0:
            self._begin_window(window % self.windows)
        x = ((frame - self.run.mean) / self.run.std).expand(self.windows, -1)
        output, self._state = self.model.rnn.step(x, self._state)
        self._total += output
        self.frames += 1
        window, rest = divmod(self.frames - FRAMES, STRIDE)
        if window < 0 or rest != 0:
            return None
        row = window % self.windows
        pooled = self._total[row] / FRAMES if self.model.pooling == "mean" else output[row]
        return self.model.classifier(pooled).softmax(0)

    def _begin_window(self, row: int) -> None:
        """Begin a window in the batch's row ``row``."""
        self._total[row] = 0
        for state in self._state if isinstance(self._state, tuple) else (self._state,):
            if state is not None:
                state[:, row] = 0

    def _decide(self, probabilities: Tensor) -> Iterator[Detection]:
        self._recent.append(probabilities)
        yield from self._judge(SMOOTHING)

    def _judge(self, windows: int) -> Iterator[Detection]:
        """Decide which word the last windows say, by an average over ``windows``, and yield the word that it ends."""
        average = torch.stack(tuple(self._recent)).sum(0) / windows
        probability, number = average.max(0)
        word: str | None = self.run.outputs[int(number)]
        if probability < THRESHOLD or word in IGNORED or not any(self._loud):
            word = None
        if word != self._word:
            yield from self._end_word()
            self._word, self._word_windows = word, []
        if word is not None:
            middle = self.frames - (FRAMES + (windows - 1) * STRIDE) / 2
            self._word_windows.append((middle * HOP / RATE, float(probability)))
            if len(self._word_windows) == LONGEST:
                yield self._detection()

    def _detection(self) -> Detection:
        weight = sum(probability for _, probability in self._word_windows)
        seconds = sum(seconds * probability for seconds, probability in self._word_windows) / weight
        return Detection(seconds, self._word, max(probability for _, probability in self._word_windows))


def main(args: Sequence[str] | None = None) -> int:
    """Run the program with ``args`` (default: the command line's) and return its exit code."""

    def program() -> None:
        options = parser().parse_intermixed_args(args)
        with as_user_error(OSError, ValueError), open_sound(options.file) as (stream, name):
            listen(Listener(open_run(options.run)), pieces(stream, name, options.rate))

    return run_program(program)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = OptionParser(
        prog=command("listen"),
        description="Print the words in a stream of sound with their times, detected by a network that was "
        "trained on speech. The sound may have any rate; it is resampled to 16,000 Hz, and channels are averaged.",
        epilog=f"Example: arecord -f S16_LE -r 16000 -c 1 | {command('listen')} runs/spoken-gru. A network without "
        "the class silence (--data spoken:...) also reports words in noise.",
    )
    top.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    top.add_argument("file", metavar="FILE", type=Path, nargs="?", help="a WAV file (default: standard input)")
    top.add_argument(
        "--rate",
        type=int,
        help="the sound is raw 16-bit samples of one channel, without a WAV header, at this rate, such as 48000",
    )
    return top


@contextlib.contextmanager
def open_sound(file: Path | None) -> Iterator[tuple[BinaryIO, str]]:
    """Open ``file`` or standard input; yield the stream and its name for messages."""
    if file is None:
        if sys.stdin.isatty():
            raise UserError("no sound on standard input: name a file, or pipe a recording in")
        yield sys.stdin.buffer, "standard input"
    else:
        with file.open("rb") as stream:
            yield stream, str(file)


def print_detections(detections: Iterable[Detection]) -> None:
    """Print a line for each detection."""
    for seconds, word, probability in detections:
        print(f"{seconds:8.1f} s  {word}  {probability:.0%}", flush=True)


def listen(listener: Listener, sound: Iterator[Tensor]) -> None:
    """Print the detected words until the sound ends or Ctrl-C, then the time that the network took."""
    torch.set_num_threads(1)  # for so small a network, a second thread costs more time than it saves
    samples, busy = 0, 0.0
    with contextlib.suppress(KeyboardInterrupt):
        for chunk in sound:
            begin = time.perf_counter()
            detections = list(listener(chunk))
            busy += time.perf_counter() - begin
            samples += len(chunk)
            print_detections(detections)
    print_detections(listener.end())
    heard = f"{samples / RATE:.1f} s of sound"
    if samples >= RATE:
        factor = busy * RATE / samples
        heard += f"; a window of 1 s takes {1000 * factor:.0f} ms: real-time factor {factor:.3f}"
    print(heard)


if __name__ == "__main__":
    sys.exit(main())
