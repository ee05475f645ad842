"""Characters: a text for a language model, and snippets of text to tell apart.

The text that is always there is Python's own help, the topics of `help()`. It differs by Python's version: `notes`
records the version and a hash. A fifth of it repeats itself, since long topics hold short ones whole: each paragraph
is kept once, or test and training parts would share text and scores would flatter.
"""

import hashlib
import platform
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rnn.data.common import Data, Text
from rnn.data.plain_text import read_text
from str_triton.training.errors import warn

REPLACEMENT = "\ufffd"
MIN_COUNT = 5  # characters that the training part has less often become REPLACEMENT
SHORTEST = 2_000  # characters: 100 in each of the two parts of 5 %
TOPICS, SNIPPET, STRIDE = 16, 128, 32
LONGEST = 512  # characters of a labelled line
EVERY = 10
SEPARATOR = "\n\n\n"  # between topics

Parts = dict[str, list[tuple[str, int]]]  # of "train", "validation" and "test": texts and their labels


@dataclass(frozen=True)
class Vocabulary:
    """Characters and their numbers. `symbols[0]` is REPLACEMENT and stands for all that are not here."""

    symbols: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """Take the characters that `text` has at least MIN_COUNT times, by code point, after REPLACEMENT.

        Raises ValueError where there is none.
        """
        points, counts = np.unique(_code_points(text), return_counts=True)
        frequent = [chr(point) for point in points[counts >= MIN_COUNT]]
        symbols = [symbol for symbol in frequent if symbol != REPLACEMENT]
        if not symbols:
            raise ValueError(f"no character occurs {MIN_COUNT} times in the training text: it takes a longer one")
        return cls((REPLACEMENT, *symbols))

    def encode(self, text: str) -> Tensor:
        """The numbers of the characters of `text`: int64 [len(text)]."""
        points = _code_points(text)
        known = _code_points("".join(self.symbols[1:]))
        numbers = np.zeros(int(max(points.max(initial=0), known.max(initial=0))) + 1, dtype=np.int64)
        numbers[known] = np.arange(1, len(self.symbols))
        return torch.from_numpy(numbers[points])


@dataclass(frozen=True, eq=False)
class Snippets:
    """Texts of `symbols` different characters, one-hot. See `common.Examples`.

    codes: int64 [N, T], -1 at the padded steps; labels: int64 [N]; lengths: int64 [N], or None where all have T
    characters; all on the CPU. Batches are x [B, T, symbols], zeros at the padded steps. `augment` changes nothing.
    """

    codes: Tensor
    labels: Tensor
    lengths: Tensor | None
    symbols: int

    @classmethod
    def of(cls, texts: list[tuple[str, int]], vocabulary: Vocabulary) -> "Snippets":
        """From pairs of a text and its label."""
        lengths = torch.tensor([len(text) for text, _ in texts])
        codes = vocabulary.encode("".join(text for text, _ in texts)).split(lengths.tolist())
        padded = pad_sequence(codes, batch_first=True, padding_value=-1)
        labels = torch.tensor([label for _, label in texts])
        return cls(padded, labels, None if bool((lengths == lengths[0]).all()) else lengths, len(vocabulary.symbols))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, indices: Tensor, *, augment: bool, generator: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        lengths, codes = None, self.codes[indices]
        if self.lengths is not None:
            lengths = self.lengths[indices]
            codes = codes[:, : int(lengths.max()) if len(lengths) else 0]
        codes = codes.to(device)[:, :, None]
        x = torch.zeros(*codes.shape[:2], self.symbols, device=device)
        return x.scatter_(2, codes.clamp(min=0), (codes >= 0).float()), lengths, self.labels[indices].to(device)


def load_text(file: str | None = None) -> Text:
    """`file`, in UTF-8, or Python's help (topics in the order of their names): see `as_text`.

    Line ends become "\\n". Raises ValueError for a file that is empty, too short, or not UTF-8, and OSError for one
    that cannot be read.
    """
    if file is not None:
        return as_text(_read(file), f"text:{file}")
    return as_text(SEPARATOR.join(python_topics().values()), "text", python=platform.python_version())


def as_text(text: str, name: str, **notes: str) -> Text:
    """Cut `text` by position: the first 90 % are for training, 5 % each for validation and test.

    The vocabulary is that of the training part; `notes` gets the SHA-256 of the text as UTF-8 and the share of the
    test characters that are replaced. Raises ValueError for a text of fewer than SHORTEST characters.
    """
    if len(text) < SHORTEST:
        raise ValueError(f"{name}: {len(text):,} characters; a language model takes at least {SHORTEST:,}")
    ends = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    parts = [text[start:end] for start, end in pairwise(ends)]
    vocabulary = Vocabulary.of(parts[0])
    train, validation, test = (vocabulary.encode(part) for part in parts)
    notes |= {
        "sha256": _hash(text),
        "split": "by position: 90 % training, 5 % validation, 5 % test",
        "replaced": f"{(test == 0).double().mean():.3%} of the test characters",
    }
    return Text(name, vocabulary.symbols, train, validation, test, notes)


def load_snippets(file: str | None = None) -> Data:
    """`load_lines(file)`, or without a file `load_topics()`."""
    return load_topics() if file is None else load_lines(file)


def load_topics() -> Data:
    """Snippets of Python's help, to be told which of its TOPICS longest topics they are from.

    Each topic is cut by position into 70 % training, 15 % validation and 15 % test, and these into snippets of SNIPPET
    characters: in training one begins every STRIDE characters, elsewhere they do not overlap.
    """
    topics = python_topics()
    names = tuple(sorted(sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[:TOPICS]))
    training, parts = "", _no_parts()
    for label, name in enumerate(names):
        text = topics[name]
        ends = [0, len(text) * 70 // 100, len(text) * 85 // 100, len(text)]
        training += text[: ends[1]]
        for part, (begin, end) in zip(parts, pairwise(ends), strict=True):
            starts = range(begin, end - SNIPPET + 1, STRIDE if part == "train" else SNIPPET)
            parts[part] += [(text[start : start + SNIPPET], label) for start in starts]
    notes = {
        "python": platform.python_version(),
        "sha256": _hash(SEPARATOR.join(topics.values())),
        "split": "by position in each topic: 70 % training, 15 % validation, 15 % test",
    }
    return _snippets("text", names, training, parts, notes)


def load_lines(file: str) -> Data:
    """The lines of `file`, "label<TAB>text" in UTF-8: the text is to be told its label.

    Texts of more than LONGEST characters are cut; empty lines and repeated ones are left out. Of the lines of each
    label the ninth of every ten is for validation, the tenth for test.

    Raises ValueError, naming file and line, for one without a tab, label or text; also for a file that is empty or not
    UTF-8, has a single label, or a label with fewer than EVERY lines; OSError for a file that cannot be read.
    """
    text = _read(file)
    by_label = _labelled_lines(text, file)
    names = tuple(sorted(by_label))
    if len(names) < 2:
        raise ValueError(f"{file}: all lines have the label {names[0]!r}; it takes two to tell apart")
    parts = _no_parts()
    for label, name in enumerate(names):
        lines = by_label[name]
        if len(lines) < EVERY:
            raise ValueError(f"{file}: {len(lines)} different lines with the label {name!r}; it takes {EVERY} of each")
        for place, line in enumerate(lines):
            part = {EVERY - 2: "validation", EVERY - 1: "test"}.get(place % EVERY, "train")
            parts[part].append((line, label))
    notes = {
        "sha256": _hash(text),
        "split": "of every ten lines of a label 8 for training, 1 validation, 1 test",
        "length": f"lines are cut to {LONGEST} characters",
    }
    training = "".join(line for line, _ in parts["train"])
    return _snippets(f"text:{file}", names, training, parts, notes)


def python_topics() -> dict[str, str]:
    """The topics of Python's help by name, in the order of the names, each paragraph in one topic only.

    A paragraph that is in several stays in the longest of them. Topics that lose more than half of their characters
    that way are left out. Raises ValueError where Python comes without its help.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise ValueError("this Python comes without its help texts (pydoc_data): name a file, text:FILE") from None
    seen: set[str] = set()
    kept = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        new = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())  # a quoted one may be indented differently
            if words not in seen:
                seen.add(words)
                new.append(paragraph)
        text = "\n\n".join(new)
        if 2 * len(text) >= len(topics[name]):
            kept[name] = text
    return dict(sorted(kept.items()))


def _no_parts() -> Parts:
    return {"train": [], "validation": [], "test": []}


def _labelled_lines(text: str, file: str) -> dict[str, list[str]]:
    """Return the different lines of each label, in their order; warn of how many are repeated or cut."""
    by_label: dict[str, dict[str, None]] = defaultdict(dict)
    repeated = cut = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        label, tab, content = line.partition("\t")
        if not (tab and label.strip() and content.strip()):
            raise ValueError(f"{file}: line {number} is not a label, a tab and a text")
        line, known = content.strip(), by_label[label.strip()]
        cut += len(line) > LONGEST
        repeated += line[:LONGEST] in known
        known[line[:LONGEST]] = None
    for number, what in (
        (cut, f"are longer than {LONGEST} characters and cut"),
        (repeated, "are repeated and left out"),
    ):
        if number:
            warn(f"text:{file}: {number} lines {what}")
    return {label: list(lines) for label, lines in by_label.items()}


def _snippets(name: str, class_names: tuple[str, ...], training: str, parts: Parts, notes: dict[str, str]) -> Data:
    """The data set of `parts`, with the vocabulary of the `training` text."""
    vocabulary = Vocabulary.of(training)
    examples = {part: Snippets.of(texts, vocabulary) for part, texts in parts.items()}
    return Data(name=name, class_names=class_names, input_size=len(vocabulary.symbols), notes=notes, **examples)


def _read(file: str) -> str:
    """Return the text of a file; raise ValueError where there is none in it."""
    text = read_text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
