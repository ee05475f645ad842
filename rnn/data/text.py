"""Text as characters: one text for a language model, or labelled snippets to classify.

The default text is Python's own help, the topics of `help()`. The help depends on Python's version, so `notes` records
the version and a hash. Long topics repeat short topics, a fifth of the help in total. Each paragraph is kept only once,
because otherwise training and test parts would share text and the scores would be too good.
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

from str_triton.rnn.data.common import Data, Text
from str_triton.rnn.data.plain_text import read_text
from str_triton.training.errors import warn

REPLACEMENT = "\ufffd"
MIN_COUNT = 5  # characters that are rarer than that in the training part become REPLACEMENT
SHORTEST = 2_000  # characters: 100 in each of the two parts of 5 %
TOPICS, SNIPPET, STRIDE = 16, 128, 32  # the number of topics; characters of a snippet, and between training snippets
LONGEST = 512  # characters of a labelled line
EVERY = 10  # of every ten lines of a label one is for validation and one for test
SEPARATOR = "\n\n\n"  # between topics

Parts = dict[str, list[tuple[str, int]]]  # "train", "validation" and "test" -> pairs of text and label


@dataclass(frozen=True)
class Vocabulary:
    """A list of characters; a character is encoded as its index. REPLACEMENT, index 0, stands for all others."""

    symbols: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """Collect the characters that occur at least MIN_COUNT times in `text`, sorted by code point.

        Raises ValueError where no character is that frequent.
        """
        points, counts = np.unique(_code_points(text), return_counts=True)
        frequent = [chr(point) for point in points[counts >= MIN_COUNT]]
        symbols = [symbol for symbol in frequent if symbol != REPLACEMENT]
        if not symbols:
            raise ValueError(f"no character occurs {MIN_COUNT} times in the training text: use a longer text")
        return cls((REPLACEMENT, *symbols))

    def encode(self, text: str) -> Tensor:
        """Return the indices of the characters of `text`, int64 [len(text)]."""
        points = _code_points(text)
        known = _code_points("".join(self.symbols[1:]))
        numbers = np.zeros(int(max(points.max(initial=0), known.max(initial=0))) + 1, dtype=np.int64)
        numbers[known] = np.arange(1, len(self.symbols))
        return torch.from_numpy(numbers[points])


@dataclass(frozen=True, eq=False)
class Snippets:
    """Labelled texts over a vocabulary of `symbols` characters, read as one-hot vectors. See `common.Examples`.

    codes: int64 [N, T], -1 at the padded steps. labels: int64 [N]. lengths: int64 [N], or None where all texts have T
    characters. All three are on the CPU. A batch is x [B, T, symbols] with zeros at the padded steps. `augment` has no
    effect.
    """

    codes: Tensor
    labels: Tensor
    lengths: Tensor | None
    symbols: int

    @classmethod
    def of(cls, texts: list[tuple[str, int]], vocabulary: Vocabulary) -> "Snippets":
        """Encode pairs of a text and its label."""
        lengths = torch.tensor([len(text) for text, _ in texts])
        codes = vocabulary.encode("".join(text for text, _ in texts)).split(lengths.tolist())
        padded = pad_sequence(codes, batch_first=True, padding_value=-1)
        labels = torch.tensor([label for _, label in texts])
        return cls(padded, labels, None if bool((lengths == lengths[0]).all()) else lengths, len(vocabulary.symbols))

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, index: int) -> bytes:
        return self.codes[index].numpy().tobytes()

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
    """Read `file`, by default Python's help with its topics in alphabetic order, and split it with `split_text`.

    Line ends become "\\n". Raises ValueError for a file that is empty, too short, or not UTF-8, and OSError for a file
    that cannot be read.
    """
    if file is not None:
        return split_text(_read(file), f"text:{file}")
    return split_text(SEPARATOR.join(python_topics().values()), "text", python=platform.python_version())


def split_text(text: str, name: str, **notes: str) -> Text:
    """Split `text` by position: 90 % for training, then 5 % for validation and 5 % for test.

    The vocabulary comes from the training part. `notes` gets the SHA-256 of the text as UTF-8 and the share of the test
    characters that are replaced. Raises ValueError for a text of fewer than SHORTEST characters.
    """
    if len(text) < SHORTEST:
        raise ValueError(f"{name}: {len(text):,} characters; a language model needs at least {SHORTEST:,}")
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
    """Read labelled snippets: `load_lines(file)`, or `load_topics()` without a file."""
    return load_topics() if file is None else load_lines(file)


def load_topics() -> Data:
    """Make snippets of the TOPICS longest topics of Python's help; a snippet's label is its topic.

    Each topic is split by position into 70 % training, 15 % validation and 15 % test, and each part into snippets of
    SNIPPET characters. A training snippet begins every STRIDE characters. Other snippets do not overlap.
    """
    topics = python_topics()
    names = tuple(sorted(sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[:TOPICS]))
    training, parts = "", _empty_parts()
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
    """Read labelled texts from the lines "label<TAB>text" of `file`, in UTF-8.

    Texts of more than LONGEST characters are cut. Empty lines and repeated lines are skipped. Of every ten lines of a
    label the ninth is for validation and the tenth for test.

    Raises ValueError, naming file and line, for a line without a tab, label or text. Raises ValueError also for a file
    that is empty or not UTF-8, that has a single label, or a label with fewer than EVERY lines; OSError for a file that
    cannot be read.
    """
    text = _read(file)
    by_label = _labelled_lines(text, file)
    names = tuple(sorted(by_label))
    if len(names) < 2:
        raise ValueError(f"{file}: all lines have the label {names[0]!r}; at least two labels are needed")
    parts = _empty_parts()
    for label, name in enumerate(names):
        lines = by_label[name]
        if len(lines) < EVERY:
            raise ValueError(f"{file}: {len(lines)} different lines with the label {name!r}; each label needs {EVERY}")
        for index, line in enumerate(lines):
            part = {EVERY - 2: "validation", EVERY - 1: "test"}.get(index % EVERY, "train")
            parts[part].append((line, label))
    notes = {
        "sha256": _hash(text),
        "split": "of every ten lines of a label 8 for training, 1 for validation, 1 for test",
        "length": f"lines are cut to {LONGEST} characters",
    }
    training = "".join(line for line, _ in parts["train"])
    return _snippets(f"text:{file}", names, training, parts, notes)


def python_topics() -> dict[str, str]:
    """Return the topics of Python's help by name, in alphabetic order, each paragraph in one topic only.

    A paragraph that several topics share stays in the longest of them. Topics that lose more than half of their
    characters in this way are left out. Raises ValueError where Python's help is not installed.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise ValueError("this Python has no help texts (pydoc_data is missing): name a file, text:FILE") from None
    seen: set[str] = set()
    kept = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        new = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())  # a repeated paragraph may be indented differently
            if words not in seen:
                seen.add(words)
                new.append(paragraph)
        text = "\n\n".join(new)
        if 2 * len(text) >= len(topics[name]):
            kept[name] = text
    return dict(sorted(kept.items()))


def _empty_parts() -> Parts:
    return {"train": [], "validation": [], "test": []}


def _labelled_lines(text: str, file: str) -> dict[str, list[str]]:
    """Return the distinct lines of each label, in their order; warn with the numbers of repeated and cut lines."""
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
    for count, remark in (
        (cut, f"are longer than {LONGEST} characters and cut"),
        (repeated, "are repeated and skipped"),
    ):
        if count:
            warn(f"text:{file}: {count} lines {remark}")
    return {label: list(lines) for label, lines in by_label.items()}


def _snippets(name: str, class_names: tuple[str, ...], training: str, parts: Parts, notes: dict[str, str]) -> Data:
    """Make the data set of `parts` with the vocabulary of the `training` text."""
    vocabulary = Vocabulary.of(training)
    examples = {part: Snippets.of(texts, vocabulary) for part, texts in parts.items()}
    return Data(
        name=name,
        class_names=class_names,
        input_size=len(vocabulary.symbols),
        train=examples["train"],
        validation=examples["validation"],
        test=examples["test"],
        notes=notes,
    )


def _read(file: str) -> str:
    """Return the text of a file; raise ValueError for an empty file."""
    text = read_text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
