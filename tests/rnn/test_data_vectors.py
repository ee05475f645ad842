"""Sequences of vectors in memory, the data set that comes with the project, and data sets by name."""

import dataclasses
import gzip
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from str_triton.rnn.data import KNOWN, Data, load, with_validation
from str_triton.rnn.data import japanese_vowels as module
from str_triton.rnn.data.vectors import Standardisation, VectorExamples, check_finite
from tests.messages import holding

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(examples, indices: list[int]):
    return examples.batch(torch.tensor(indices), augment=False, generator=generator(), device=CPU)


@pytest.fixture(scope="module")
def vowels() -> Data:
    return load("japanese-vowels", noise=0.5)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("vowels", {}, r"'vowels'; did you mean japanese-vowels\?$"),
        ("", {}, "''; .*japanese-vowels, speech-commands:DIR, .*, text:FILE$"),
        ("digits", {}, "'digits'; .*japanese-vowels, speech-commands:DIR, .*, text:FILE$"),
        ("spokn:yes,no", {}, r"'spokn:yes,no'; did you mean spoken:WORD,WORD,\.\.\.\?$"),
        ("har", {}, "'har'; .*har:PATH"),
        ("har:", {}, "'har:'; .*har:PATH"),
        ("text:", {}, "'text:'; .*text or text:FILE"),
        ("japanese-vowels:1", {}, "'japanese-vowels:1'; .*japanese-vowels"),
        ("japanese-vowels", {"task": "tag"}, "'tag'.* classify, lm"),
        ("japanese-vowels", {"task": "lm"}, "task 'lm' .*'japanese-vowels'"),
        ("har:x", {"task": "lm"}, "task 'lm' .*'har:x'"),
        ("hub:a/b", {"task": "lm"}, "task 'lm' .*'hub:a/b'"),
        ("hub:a/b:text", {}, "'hub:a/b:text' .*'lm'"),
        ("japanese-vowels", {"words": ("yes",)}, "words .*speech-commands:DIR and hub:NAME.* 'japanese-vowels'"),
        ("hub:a/b:text", {"task": "lm", "words": ("yes",)}, "words .*'hub:a/b:text'"),
        ("spoken:yes,no", {"words": ("yes",)}, "words .*'spoken:yes,no'"),
        ("japanese-vowels", {"classes": 2}, "classes .*har:PATH.* 'japanese-vowels'"),
        ("text", {"noise": 0.1, "task": "lm"}, "noise 0.1 .*'text'"),
        ("japanese-vowels", {"noise": -0.1}, "noise -0.1: .*>= 0"),
        ("japanese-vowels", {"noise": float("nan")}, "noise nan: .*>= 0"),
    ],
)
def test_what_does_not_go_together_is_one_error(spec: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        load(spec, **options)
    assert "\n" not in str(caught.value)


LOADERS = [
    ("speech-commands:a/b:c", {"words": ("yes",)}, "speech_commands.load_speech_commands", "a/b:c", "words"),
    ("hub:a/b", {"words": ("yes",)}, "hub.load_hub", "a/b", "words"),
    ("spoken:yes,no", {"seed": 3}, "spoken.load_spoken", ("yes", "no"), "seed"),
    ("har:x:y", {"classes": 2}, "har.load_har", "x:y", "classes"),
    ("text:x:y", {}, "text.load_snippets", "x:y", None),
    ("text:x", {"task": "lm"}, "text.load_text", "x", None),
    ("text", {"task": "lm"}, "text.load_text", None, None),
]


def test_every_name_has_a_row():
    """Japanese Vowels, which are in the repository, are read whole."""
    rows = {spec.partition(":")[0] for spec, *_ in LOADERS}
    assert rows | {"japanese-vowels"} == {form.partition(":")[0] for form in KNOWN}


@pytest.mark.parametrize(("spec", "options", "loader", "place", "passed"), LOADERS)
def test_a_name_reaches_its_loader(
    spec: str, options: dict, loader: str, place: object, passed: str | None, monkeypatch: pytest.MonkeyPatch
):
    module_name, function_name = loader.split(".")
    source = importlib.import_module(f"str_triton.rnn.data.{module_name}")
    signature = inspect.signature(getattr(source, function_name))
    monkeypatch.setattr(source, function_name, lambda *args, **keywords: signature.bind(*args, **keywords))
    call = load(spec, **options)
    assert call.args[0] == place
    assert passed is None or call.kwargs[passed] == options[passed]


def test_a_column_of_the_hub_is_a_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("str_triton.rnn.data.hub.hub_text", lambda place: f"{place}\n" * 200)
    text = load("hub:a/b:story", task="lm")
    assert (text.name, text.task) == ("hub:a/b:story", "lm")
    assert "".join(text.vocabulary[number] for number in text.train[:12]) == "a/b:story\na/"


def test_japanese_vowels_are_all_there_in_the_published_split(vowels: Data):
    assert (vowels.name, vowels.task, vowels.input_size, vowels.num_classes) == ("japanese-vowels", "classify", 12, 9)
    assert torch.bincount(vowels.train.labels).tolist() == [24] * 9
    assert torch.bincount(vowels.validation.labels).tolist() == [6] * 9
    assert torch.bincount(vowels.test.labels).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]  # as UCI lists them
    lengths = torch.cat([part.lengths for part in (vowels.train, vowels.validation, vowels.test)])
    assert (int(lengths.min()), int(lengths.max()), int(lengths.sum())) == (7, 29, 9961)


def test_japanese_vowels_are_the_published_numbers():
    with gzip.open(module.FILE, "rt") as file:
        first = file.readline()
    assert first.startswith("1,1,1.860936,-0.207383,0.261557,-0.214562,-0.171253,-0.118167")
    features, lengths, labels = module._utterances(gzip.decompress(module.FILE.read_bytes()).decode())
    assert features.dtype == torch.float32
    assert features[0, :3, 0].tolist() == torch.tensor([1.860936, 1.891651, 1.939205]).tolist()
    # The last test utterance: its speaker's number, first step and last step.
    assert (int(labels[-1]), int(lengths[-1])) == (8, 11)
    assert features[-1, [0, 10], 0].tolist() == torch.tensor([1.421622, 1.177449]).tolist()
    assert not features[-1, 11:].any()
    # The fifth training utterance of each speaker is the first for validation.
    assert lengths[4::5][:54].tolist() == load("japanese-vowels").validation.lengths.tolist()


def test_japanese_vowels_are_standardised_by_their_training_part(vowels: Data):
    examples = vowels.train
    steps = torch.cat([row[:length] for row, length in zip(examples.features, examples.lengths, strict=True)])
    torch.testing.assert_close(steps.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(steps.std(0, correction=0), torch.ones(12), atol=1e-5, rtol=0)


def test_no_utterance_is_in_two_parts(vowels: Data):
    parts = [{tuple(row.flatten().tolist()) for row in vowels.train.features}]
    parts += [{tuple(row.flatten().tolist()) for row in part.features} for part in (vowels.validation, vowels.test)]
    assert len(parts[0] | parts[1] | parts[2]) == 640


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = gzip.decompress(module.FILE.read_bytes()).decode().splitlines()
    monkeypatch.setattr(module, "FILE", tmp_path / "vowels.csv.gz")
    module.FILE.write_bytes(gzip.compress("\n".join([rows[0], rows[1].replace("1.891651", "nan"), *rows[2:]]).encode()))
    with pytest.raises(ValueError, match=r"vowels.csv.gz: NaN.* column 3, row 2$"):
        load("japanese-vowels")
    module.FILE.write_bytes(gzip.compress("\n".join(rows[100:]).encode()))
    with pytest.raises(ValueError, match=holding("vowels.csv.gz .. 1, 2, 3")):
        load("japanese-vowels")


def test_a_batch_is_padded_to_its_longest(vowels: Data):
    indices = [5, 0, 5, 200]
    x, lengths, labels = plain(vowels.train, indices)
    assert (x.dtype, x.is_contiguous(), lengths.dtype, labels.dtype) == (torch.float32, True, torch.int64, torch.int64)
    assert x.shape == (4, int(lengths.max()), 12)
    assert lengths.tolist() == vowels.train.lengths[indices].tolist()
    assert labels.tolist() == vowels.train.labels[indices].tolist()
    for row, index, length in zip(x, indices, lengths, strict=True):
        assert torch.equal(row[:length], vowels.train.features[index, :length])
        assert not row[length:].any()


def test_sequences_of_one_length_need_no_lengths():
    examples = VectorExamples(torch.randn(4, 6, 3), torch.arange(4), None, noise=0.1)
    x, lengths, labels = plain(examples, [2, 1])
    assert (x.shape, lengths, labels.tolist()) == ((2, 6, 3), None, [2, 1])
    assert torch.equal(x, examples.features[[2, 1]])


def test_noise_has_its_deviation_and_leaves_the_padding_alone():
    lengths = torch.tensor([50, 20, 35]).repeat(40)
    mask = torch.arange(50) < lengths[:, None]
    examples = VectorExamples(torch.zeros(120, 50, 8), torch.zeros(120, dtype=torch.int64), lengths, noise=0.3)
    everything = torch.arange(120)
    x, _, _ = examples.batch(everything, augment=True, generator=generator(), device=CPU)
    assert not x[~mask].any()
    assert x[mask].std().item() == pytest.approx(0.3, rel=0.02)
    assert x[mask].mean().item() == pytest.approx(0, abs=0.01)
    again, _, _ = examples.batch(everything, augment=True, generator=generator(), device=CPU)
    other, _, _ = examples.batch(everything, augment=True, generator=generator(1), device=CPU)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert not examples.features.any()


def test_without_augmentation_nothing_is_drawn():
    examples = VectorExamples(torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.int64), None, noise=0.3)
    source = generator()
    before = source.get_state()
    x, _, _ = examples.batch(torch.arange(2), augment=False, generator=source, device=CPU)
    assert not x.any()
    assert torch.equal(before, source.get_state())


def test_standardisation_counts_real_steps_only_and_survives_a_constant_feature():
    features = torch.tensor([[[1.0, 7.0], [3.0, 7.0]], [[5.0, 7.0], [100.0, 100.0]]])
    lengths = torch.tensor([2, 1])
    standardise = Standardisation.of(features, lengths)
    assert standardise.mean.tolist() == [3.0, 7.0]
    assert standardise.std.tolist() == pytest.approx([(8 / 3) ** 0.5, 1.0])
    result = standardise(features, lengths)
    assert result[1, 1].tolist() == [0.0, 0.0]
    assert result[:, :, 1].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_check_finite_names_the_place():
    rows = torch.zeros(3, 2)
    check_finite(rows, "x.txt")
    rows[2, 1] = float("inf")
    with pytest.raises(ValueError, match=r"x\.txt: .*infinite .*column 2, row 3$"):
        check_finite(rows, "x.txt")
    rows[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^x.txt: NaN in width, row 2$"):
        check_finite(rows, "x.txt", ("width", "height"))


def test_validation_examples_can_be_trained_on(vowels: Data):
    both = with_validation(vowels)
    assert len(both.train) == 270
    assert torch.bincount(both.train.labels).tolist() == [30] * 9
    assert "(270)" in both.notes["train"]
    assert "train" not in vowels.notes
    indices = [220, 3, 269, 0, 216, 215]
    x, lengths, labels = plain(both.train, indices)
    assert labels.tolist() == both.train.labels[indices].tolist()
    for row, index, length in zip(x, indices, lengths, strict=True):
        part, place = (vowels.train, index) if index < 216 else (vowels.validation, index - 216)
        assert length == part.lengths[place]
        assert torch.equal(row[:length], part.features[place, :length])
        assert not row[length:].any()
    for indices, part in (([3, 2], vowels.train), ([217, 216], vowels.validation)):
        expected = plain(part, [index % 216 for index in indices])
        assert all(torch.equal(got, want) for got, want in zip(plain(both.train, indices), expected, strict=True))


def test_merged_sequences_of_one_length_need_no_lengths(vowels: Data):
    part = VectorExamples(torch.randn(4, 6, 3), torch.arange(4))
    data = dataclasses.replace(vowels, train=part, validation=part)
    x, lengths, labels = plain(with_validation(data).train, [5, 0])
    assert (x.shape, lengths, labels.tolist()) == ((2, 6, 3), None, [1, 0])
