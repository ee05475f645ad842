"""Text for a language model, and labelled snippets of text."""

from pathlib import Path

import pytest
import torch

from str_triton.rnn.data import Data, Text, load
from str_triton.rnn.data.text import REPLACEMENT, Vocabulary, python_topics, split_text
from tests.messages import holds

ENGLISH = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 50


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "some.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def characters(text: Text, part: torch.Tensor) -> str:
    return "".join(text.vocabulary[number] for number in part.tolist())


def labelled(counts: dict[str, int]) -> list[str]:
    return [
        f"{label}\t{label} {number:03} {'z' * number}" for label, count in counts.items() for number in range(count)
    ]


def texts_of(data: Data, part: str, symbols: tuple[str, ...]) -> list[str]:
    examples = getattr(data, part)
    return ["".join(symbols[code] for code in row[row >= 0].tolist()) for row in examples.codes]


@pytest.fixture(scope="module")
def topics() -> Data:
    return load("text")


def test_a_file_is_cut_by_position(tmp_path: Path):
    text = load(f"text:{write(tmp_path, ENGLISH)}", task="lm")
    assert (text.task, text.vocabulary[0]) == ("lm", REPLACEMENT)
    parts = (text.train, text.validation, text.test)
    assert [len(part) for part in parts] == [3330, 185, 185]
    assert all(part.dtype == torch.int64 and part.device.type == "cpu" for part in parts)
    assert "".join(characters(text, part) for part in parts) == ENGLISH


def test_rare_and_unknown_characters_are_replaced():
    body = "abcde\n" * 500
    text = split_text("é" * 4 + "ß" * 5 + body + "éßü𝄞", "x")
    assert text.vocabulary == (REPLACEMENT, "\n", "a", "b", "c", "d", "e", "ß")
    assert text.train[:9].tolist() == [0] * 4 + [7] * 5
    assert characters(text, text.test)[-4:] == "\ufffdß\ufffd\ufffd"
    assert text.notes["replaced"] == f"{3 / len(text.test):.3%} of the test characters"


def test_a_text_that_has_the_replacement_itself_has_it_once():
    vocabulary = Vocabulary.of("\ufffd" * 10 + "a" * 10)
    assert vocabulary.symbols == (REPLACEMENT, "a")
    assert vocabulary.encode("a\ufffd").tolist() == [1, 0]
    assert vocabulary.encode("").shape == (0,)


def test_line_ends_and_byte_order_mark_leave_no_trace(tmp_path: Path):
    expected = load(f"text:{write(tmp_path, ENGLISH)}", task="lm")
    path = write(tmp_path, b"\xef\xbb\xbf" + ENGLISH.replace("\n", "\r\n").encode())
    windows = load(f"text:{path}", task="lm")
    assert windows.notes == expected.notes
    assert torch.equal(windows.train, expected.train)


@pytest.mark.parametrize("task", ["lm", "classify"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"some\.txt is empty$"),
        (b" \n\n", r"some\.txt is empty$"),
        (b"caf\xe9 au lait", r"some\.txt .*UTF-8 .*byte 3\b"),
        ("no mark".encode("utf-16-le"), r"some\.txt .*UTF-8 .*character 2 .*NUL"),
        (b"\xff\xfea", r"some\.txt .*UTF-8"),
    ],
)
def test_unreadable_files_are_refused(task: str, content: bytes, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load(f"text:{write(tmp_path, content)}", task=task)


def test_a_short_text_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"some\.txt: 1,999 .*2,000\b"):
        load(f"text:{write(tmp_path, ENGLISH[:1999])}", task="lm")
    assert load(f"text:{write(tmp_path, ENGLISH[:2000])}", task="lm")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_is_the_same_however_it_is_encoded(encoding: str, end: str, tmp_path: Path):
    (tmp_path / "x.txt").write_bytes((ENGLISH + "\n\u00e9").replace("\n", end).encode(encoding))
    (tmp_path / "y.txt").write_bytes((ENGLISH + "\n\u00e9").encode())
    hashes = {load(f"text:{tmp_path / name}", task="lm").notes["sha256"] for name in ("x.txt", "y.txt")}
    assert len(hashes) == 1


def test_a_text_whose_characters_are_all_rare_is_refused(tmp_path: Path):
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 2500)))
    with pytest.raises(ValueError, match=r"character .*5 times"):
        load(f"text:{write(tmp_path, rare)}", task="lm")


def test_lines_that_are_cut_or_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    lines = [*labelled({"up": 20, "down": 30}), "up\t" + "x" * 513, "up\t" + "x" * 600]
    file = write(tmp_path, "\n".join([*lines, lines[0]]))
    data = load(f"text:{file}")
    assert len(data.train) + len(data.validation) + len(data.test) == 51
    cut, repeated = capsys.readouterr().err.splitlines()
    assert holds(cut, f"warning: text:{file} .. 2 lines .. 512 characters .. cut")
    assert holds(repeated, f"warning: text:{file} .. 2 lines .. repeated")


def test_a_missing_file_is_an_os_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load(f"text:{tmp_path / 'nowhere.txt'}", task="lm")


def test_a_paragraph_is_in_one_topic_only(monkeypatch: pytest.MonkeyPatch):
    shared = "shared words " * 20
    long, short = f"title\n\n{shared}\n\n" + "long " * 200 + f"\n\n{shared}", f"other\n\n   {shared}"
    own = "own words " * 50
    monkeypatch.setattr("pydoc_data.topics.topics", {"z": long, "b": short, "a": f"{shared}\n\n{own}"})
    kept = python_topics()
    assert list(kept) == ["a", "z"]  # topic b would keep only its title
    assert kept["a"] == own
    assert kept["z"] == f"title\n\n{shared}\n\n" + "long " * 200


def test_python_without_its_help_is_one_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"pydoc_data.*text:FILE"):
        load("text", task="lm")


def test_pythons_help_is_a_text_without_shared_passages():
    text = load("text", task="lm")
    assert text.name == "text"
    total = sum(len(part) for part in (text.train, text.validation, text.test))
    assert total > 300_000
    assert len(text.train) == total * 90 // 100
    assert 60 < len(text.vocabulary) < 150
    assert len(text.notes["sha256"]) == 64
    assert text.notes["python"].startswith("3.")
    train = characters(text, text.train)
    for part in (text.validation, text.test):
        passages = [characters(text, part[start : start + 150]) for start in range(0, len(part) - 150, 150)]
        assert sum(passage in train for passage in passages) == 0


def test_snippets_of_topics_do_not_overlap_between_parts(topics: Data):
    assert (topics.task, topics.num_classes, len(topics.class_names)) == ("classify", 16, 16)
    texts = python_topics()
    symbols = Vocabulary.of("".join(texts[name][: len(texts[name]) * 70 // 100] for name in topics.class_names)).symbols
    assert topics.input_size == len(symbols)
    known = [
        "".join(character if character in symbols else REPLACEMENT for character in texts[name])
        for name in topics.class_names
    ]
    for part, begin, end in (("train", 0, 70), ("validation", 70, 85), ("test", 85, 100)):
        examples = getattr(topics, part)
        assert examples.codes.shape[1] == 128
        assert int(torch.bincount(examples.labels, minlength=16).min()) >= 3
        regions = [text[len(text) * begin // 100 : len(text) * end // 100] for text in known]
        for snippet, label in zip(texts_of(topics, part, symbols), examples.labels.tolist(), strict=True):
            assert snippet in regions[label]


def test_snippets_are_one_hot(topics: Data):
    indices = torch.tensor([7, 0, 99])
    source = torch.Generator().manual_seed(0)
    x, lengths, labels = topics.test.batch(indices, augment=True, generator=source, device="cpu")
    assert (x.dtype, x.shape, lengths) == (torch.float32, (3, 128, topics.input_size), None)
    assert torch.equal(x.argmax(2), topics.test.codes[indices])
    assert torch.equal(x.sum(2), torch.ones(3, 128))
    assert torch.equal(labels, topics.test.labels[indices])


def test_lines_with_labels_are_split_by_label(tmp_path: Path):
    lines = labelled({"up": 20, "down": 30})
    content = "\n".join([*lines, "", lines[3], "  "])
    data = load(f"text:{write(tmp_path, content)}")
    assert data.class_names == ("down", "up")
    assert [torch.bincount(part.labels).tolist() for part in (data.train, data.validation, data.test)] == [
        [24, 16],
        [3, 2],
        [3, 2],
    ]
    # Of every ten lines the ninth is validation and the tenth test. A line's length is 8 (or 6) plus its number.
    assert data.validation.lengths.tolist() == [17, 27, 37, 15, 25]
    assert data.test.lengths.tolist() == [18, 28, 38, 16, 26]


def test_lines_are_padded_with_zeros(tmp_path: Path):
    data = load(f"text:{write(tmp_path, chr(10).join(labelled({'up': 20, 'down': 30})))}")
    indices = torch.tensor([0, 5, 2])
    x, lengths, _ = data.train.batch(indices, augment=False, generator=torch.Generator(), device="cpu")
    assert lengths.tolist() == [8, 14, 11]
    assert x.shape == (3, 14, data.input_size)
    assert torch.equal(x.sum(2), (torch.arange(14) < lengths[:, None]).float())


def test_long_lines_are_cut(tmp_path: Path):
    lines = [f"{label}\t{number:03}{'x' * 600}" for label in "ab" for number in range(10)]
    data = load(f"text:{write(tmp_path, chr(10).join(lines))}")
    assert data.train.codes.shape == (16, 512)
    assert data.train.lengths is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["up\tone", "down two"], r"some\.txt: line 2 .*label, a tab"),
        (["up\tone", "", "\ttwo"], r"some\.txt: line 3 .*label, a tab"),
        (["up\t "], r"some\.txt: line 1 .*label, a tab"),
        (labelled({"up": 20}), r"some\.txt: .*'up'"),
        (
            labelled({"up": 20, "down": 9}) + labelled({"down": 9}),
            r"some\.txt: 9 .*'down'.* 10\b",
        ),
    ],
)
def test_lines_that_cannot_be_learned_from_are_refused(lines: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load(f"text:{write(tmp_path, chr(10).join(lines))}")
