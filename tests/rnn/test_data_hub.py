"""Speech and text in the format of the Hugging Face hub, from local files only."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from str_triton.rnn.data import load
from str_triton.rnn.data.audio import RATE, read_wav, write_wav
from str_triton.rnn.data.hub import hub_text
from tests.messages import holding

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

NAMES = ["bed", "cat", "dog", "_silence_"]
COUNTS = {"train": 6, "validation": 3, "test": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def sound(number: int, frames: int = RATE) -> np.ndarray:
    return np.random.default_rng(number).integers(-8000, 8000, frames, np.int16)


def wav(tmp_path: Path, samples: np.ndarray) -> bytes:
    write_wav(tmp_path / "one.wav", samples)
    return (tmp_path / "one.wav").read_bytes()


def first_of(part: str) -> int:
    return {"train": 0, "validation": 100, "test": 200}[part]


def folder(tmp_path: Path, change: object = None, strings: bool = False, silence: bool = True) -> Path:
    """Write Parquet files in the hub's format of Speech Commands; `change(part, columns)` may damage them."""
    root = tmp_path / "set"
    root.mkdir()
    for part, count in COUNTS.items():
        numbers = [first_of(part) + k for k in range(count)]
        sounds = [{"bytes": wav(tmp_path, sound(number)), "path": f"{number}.wav"} for number in numbers]
        labels = [k % 3 for k in range(count)]
        if silence and part == "train":
            sounds.append({"bytes": wav(tmp_path, sound(999, 20 * RATE)), "path": None})
            labels.append(3)
        columns = {"audio": sounds, "label": [NAMES[k] for k in labels] if strings else labels}
        label = datasets.Value("string") if strings else datasets.ClassLabel(names=NAMES)
        audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = {"audio": audio, "label": label}
        if change is not None:
            change(part, columns)
        features = datasets.Features({name: features.get(name, datasets.Value("string")) for name in columns})
        rows = datasets.Dataset.from_dict(columns, features=features)
        if "audio" in columns:  # not above: encoding needs torchcodec, even for recordings that are encoded already
            rows = rows.cast_column("audio", datasets.Audio(sampling_rate=RATE))
        rows.to_parquet(root / f"{part}-00000-of-00001.parquet")
    return root


def read(root: Path | str, words: tuple[str, ...] | None = ("all",)) -> object:
    return load(f"hub:{root}", words=words, cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE).parent / "clips"))


def refuse(root: Path | str, message: str, words: tuple[str, ...] | None = ("all",)) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(root, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strings", [False, True])
def test_parquet_with_the_bytes_of_wav_files(tmp_path: Path, strings: bool):
    data = read(folder(tmp_path, strings=strings))
    assert (data.class_names, data.input_size) == (("bed", "cat", "dog"), 32)
    for part, count in COUNTS.items():
        examples = getattr(data, part)
        assert examples.labels.tolist() == [k % 3 for k in range(count)]
        expected = [torch.from_numpy(sound(first_of(part) + k)) for k in range(count)]
        assert torch.equal(examples.clips(torch.arange(count)), torch.stack(expected))
    x, lengths, labels = data.test.batch(torch.tensor([1]), augment=False, generator=torch.Generator(), device="cpu")
    assert (x.shape, lengths, labels.tolist()) == ((1, 99, 32), None, [1])


def test_silence_comes_from_the_recordings_of_that_label(tmp_path: Path):
    data = read(folder(tmp_path), ("bed", "cat"))
    assert data.class_names == ("bed", "cat", "silence", "unknown")
    assert torch.bincount(data.train.labels).tolist() == [2, 2, 2, 2]
    assert len(data.train.background) == 16 * RATE


def test_without_them_there_is_no_silence(tmp_path: Path):
    refuse(folder(tmp_path, silence=False), "no background noise", ("bed",))


def test_flac_is_decoded_by_soundfile(tmp_path: Path):
    soundfile = pytest.importorskip("soundfile", exc_type=(ImportError, OSError))

    def to_flac(part: str, columns: dict) -> None:
        for value in columns["audio"]:
            (tmp_path / "two.wav").write_bytes(value["bytes"])
            samples, rate = read_wav(tmp_path / "two.wav")
            file = io.BytesIO()
            soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
            value["bytes"] = file.getvalue()

    data = read(folder(tmp_path, to_flac))
    assert torch.equal(data.test.clips(torch.tensor([0]))[0], torch.from_numpy(sound(200)))


def spoil(content: object) -> object:
    def change(part: str, columns: dict) -> None:
        if part == "test":
            columns["audio"][1] = content(columns["audio"][1]) if callable(content) else content

    return change


def test_damaged_recordings_are_named(tmp_path: Path):
    for number, (content, message) in enumerate(
        [
            (lambda value: {**value, "bytes": value["bytes"][:1000]}, r"test\[1\] is truncated"),
            (lambda value: {**value, "bytes": b""}, r"test\[1\] is empty"),
            (lambda value: {**value, "bytes": b"fLaC" + bytes(50)}, r"test\[1\] (cannot be decoded|is not a WAV file)"),
            ({"bytes": None, "path": None}, r"test\[1\]: column 'audio' has neither the bytes nor the path"),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        refuse(folder(place, spoil(content)), message)


def test_other_tables_are_refused(tmp_path: Path):
    def rename(old: str, new: str) -> object:
        return lambda part, columns: columns.update({new: [str(k) for k in range(len(columns.pop(old)))]})

    for number, (change, message) in enumerate(
        [
            (
                rename("label", "speaker"),
                r"train has no column 'label' or 'labels' or 'word'; its columns are audio, sp",
            ),
            (rename("audio", "sound"), r"train has no column 'audio'; its columns are label, sound"),
            (
                lambda part, columns: columns["label"].__setitem__(0, None),
                r"train\[0\]: column 'label' holds None.*keep_default_na",
            ),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        refuse(folder(place, change), message)
    root = folder(tmp_path)
    (root / "test-00000-of-00001.parquet").unlink()
    refuse(root, "has no split 'test', only train, validation")
    (root / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    refuse(root, f"hub:{root}: .")


def table(tmp_path: Path, labels: dict[str, list], kind: object) -> Path:
    """Write Parquet files with other labels."""
    root = tmp_path / "other"
    root.mkdir()
    for part, values in labels.items():
        sounds = [{"bytes": wav(tmp_path, sound(first_of(part) + k)), "path": None} for k in range(len(values))]
        audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = datasets.Features({"audio": audio, "label": kind})
        rows = datasets.Dataset.from_dict({"audio": sounds, "label": values}, features=features)
        rows.to_parquet(root / f"{part}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("bool", [True, False], r"train\[0\]: .*'label' .*True.* string in README.md"),
        ("int64", [3, 4], r"train\[0\]: .*'label' .* 3\b.* string in README.md"),
        ("float64", [0.5, 1.0], r"train\[0\]: .*'label' .* 0\.5"),
        ("string", ["", "no"], r"train\[0\]: .*'label' .* ''"),
        ("string", ["yes", "yes"], "has one word, 'yes'"),
        ("names", [0, -1], r"train\[1\]: .*'label' .* -1.* 0 to 3"),
    ],
)
def test_labels_that_are_no_words_are_refused_before_the_sound_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, labels: list, message: str
):
    monkeypatch.setattr(
        "str_triton.rnn.data.hub.cached_clips", lambda *args, **options: pytest.fail("the clips were read")
    )
    feature = datasets.ClassLabel(names=NAMES) if kind == "names" else datasets.Value(kind)
    refuse(table(tmp_path, dict.fromkeys(COUNTS, labels), feature), message)


def test_a_split_without_recordings_of_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "str_triton.rnn.data.hub.cached_clips", lambda *args, **options: pytest.fail("the clips were read")
    )
    labels = {"train": ["yes", "no"], "validation": ["yes", "no"], "test": ["yes"]}
    refuse(table(tmp_path, labels, datasets.Value("string")), "the class 'no' has no clip for test")


def test_a_compressed_recording_of_days_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    soundfile = pytest.importorskip("soundfile", exc_type=(ImportError, OSError))
    monkeypatch.setattr("str_triton.rnn.data.hub.LONGEST", 2)

    def longer(value: dict) -> dict:
        file = io.BytesIO()
        soundfile.write(file, np.zeros(3 * RATE, np.int16), RATE, format="FLAC", subtype="PCM_16")
        return {**value, "bytes": file.getvalue()}

    refuse(folder(tmp_path, spoil(longer)), r"test\[1\] is longer than the 2 seconds")


def test_a_set_made_by_a_script_is_read_in_the_hubs_own_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    converted = {"root": folder(tmp_path)}
    load_dataset, asked = datasets.load_dataset, []

    def hub(name: str, configuration: str | None = None, revision: str | None = None) -> object:
        asked.append((name, configuration, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found speech_commands.py\nmore")
        if converted["root"] is None:
            raise ConnectionError("cannot be reached\nmore")
        return load_dataset(str(converted["root"]))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: ["v0.02", "v0.01"])
    assert read("google/speech_commands").class_names == ("bed", "cat", "dog")
    assert asked[-1] == ("google/speech_commands", "v0.02", "refs/convert/parquet")
    assert "hub:google/speech_commands has v0.01, v0.02: using v0.02" in capfd.readouterr().err
    read("google/speech_commands@v0.01")
    assert asked[-1] == ("google/speech_commands", "v0.01", "refs/convert/parquet")
    converted["root"] = None
    refuse(
        "google/speech_commands",
        "hub:google/speech_commands .*refs/convert/parquet .*: cannot be reached$",
    )


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def hub(name: str, configuration: str | None = None) -> object:
        logger.warning("retrying")
        raise ConnectionError("cannot be reached")

    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(datasets, "load_dataset", hub)
    refuse("no/such", "^hub:no/such is no folder here, .*: cannot be reached$")
    assert caplog.text == ""
    logger.warning("said again")
    assert "said again" in caplog.text


def test_a_folder_of_wav_files_is_led_to_the_right_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no data")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    (tmp_path / "yes").mkdir()
    (tmp_path / "yes" / "a.wav").touch()
    refuse(tmp_path, f"no data; .*--data speech-commands:{tmp_path}$")


def test_folders_of_wav_files_below_splits_are_led_to_the_right_reader_too(tmp_path: Path):
    """In place of the advice of the datasets library to install torchcodec, which does not help."""
    for part in COUNTS:
        for number, word in enumerate(("bed", "cat")):
            (tmp_path / part / word).mkdir(parents=True)
            write_wav(tmp_path / part / word / "a.wav", sound(first_of(part) + number))
    refuse(tmp_path, "^hub:[^;]*: folders of WAV files are --data speech-commands:DIR, .* one folder for each word")


@pytest.mark.parametrize("name", ["{}/metadata.csv", "{}.csv"])
def test_tables_of_wav_files_are_to_be_declared(name: str, tmp_path: Path):
    for part in COUNTS:
        (tmp_path / part).mkdir()
        for number, word in enumerate(("bed", "cat")):
            write_wav(tmp_path / part / f"{word}.wav", sound(first_of(part) + number))
        paths = {"file_name" if "metadata" in name else "audio": ["bed.wav", "cat.wav"], "label": ["bed", "cat"]}
        lines = [",".join(paths), *map(",".join, zip(*paths.values(), strict=True))]
        (tmp_path / name.format(part)).write_text("\n".join(lines))
    refuse(tmp_path, "^(?!.*speech-commands).* README.md as data_files$")


def test_a_table_may_name_wav_files(tmp_path: Path):
    files = ", ".join(f"{{split: {part}, path: {part}.csv}}" for part in COUNTS)
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: [{files}]}}]\n---\n")
    for part in COUNTS:
        rows = ["audio,label"]
        for number, word in enumerate(("bed", "cat")):
            write_wav(tmp_path / f"{part}-{word}.wav", sound(first_of(part) + number))
            rows.append(f"{part}-{word}.wav,{word}")
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    clips = read(tmp_path).test.clips
    assert torch.equal(clips(torch.tensor([1]))[0], torch.from_numpy(sound(201)))
    write_wav(tmp_path / "test-cat.wav", sound(1201))
    assert torch.equal(read(tmp_path).test.clips(torch.tensor([1]))[0], torch.from_numpy(sound(1201)))


def test_splits_name_no_common_recordings(tmp_path: Path):
    files = ", ".join(f"{{split: {part}, path: {part}.csv}}" for part in COUNTS)
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: [{files}]}}]\n---\n")
    for part, name in (("train", "train"), ("validation", "validation"), ("test", "./train")):
        (tmp_path / f"{part}.csv").write_text(f"audio,label\n{name}.wav,bed\n{part}2.wav,cat")
    refuse(tmp_path, "1 of the 2 files that 'test' names are also in 'train', such as ./train.wav")


def test_text_is_the_column_of_all_splits(tmp_path: Path):
    root = tmp_path / "set"
    root.mkdir()
    for part, texts in (("test", ["four"]), ("train", ["one", None, "two"]), ("validation", ["three"])):
        rows = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
        rows.to_parquet(root / f"{part}-00000-of-00001.parquet")
    assert hub_text(f"{root}:text") == "one\n\ntwo\nthree\nfour"
    with pytest.raises(ValueError, match=holding("train .. 'words' .. text .. number")):
        hub_text(f"{root}:words")
    with pytest.raises(ValueError, match=r"train: column 'number' holds 0"):
        hub_text(f"{root}:number")


def test_text_goes_to_the_language_model(tmp_path: Path):
    text = "the quick brown fox jumps over the lazy dog. " * 200
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    data = load(f"hub:{tmp_path / 'set'}:text", task="lm")
    assert sum(map(len, (data.train, data.validation, data.test))) == len(text)


def test_a_configuration_of_a_folder_is_checked_like_a_folder(tmp_path: Path):
    root = folder(tmp_path)
    (root / "README.md").write_text("---\nconfigs:\n- config_name: all\n---\n")
    assert read(f"{root}@all").class_names == ("bed", "cat", "dog")
    (root / "train-00000-of-00001.parquet").rename(root / "train-00000-of-00002.parquet")
    refuse(f"{root}@all", "train-00000-of-00002.parquet, but number 1 of 2 is missing")


def test_paths_of_recordings_begin_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    splits = {}
    audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"audio": audio, "label": datasets.Value("string")})
    for part in COUNTS:
        for number, word in enumerate(("bed", "cat")):
            write_wav(tmp_path / f"{part}-{word}.wav", sound(first_of(part) + number))
        sounds = [{"bytes": None, "path": f"{part}-{word}.wav"} for word in ("bed", "cat")]
        splits[part] = datasets.Dataset.from_dict({"audio": sounds, "label": ["bed", "cat"]}, features=features)
    monkeypatch.setattr("str_triton.rnn.data.hub.read_splits", lambda *_: splits)
    clips = read(f"{tmp_path}@all").test.clips
    assert torch.equal(clips(torch.tensor([1]))[0], torch.from_numpy(sound(201)))


def test_words_are_text_in_all_files_or_in_none(tmp_path: Path):
    root = folder(tmp_path, strings=True)
    part = datasets.load_dataset("parquet", data_files=str(root / "test-00000-of-00001.parquet"), split="train")
    part.class_encode_column("label").to_parquet(root / "test-00000-of-00001.parquet")
    refuse(root, "'label' is text in train-00000-of-00001.parquet, but numbers in test-00000-of-00001.parquet")


def test_saved_splits_may_have_a_format_and_names_in_capitals(tmp_path: Path):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("Test", "Train", "Validation")}
    datasets.DatasetDict(splits).with_format("pandas").save_to_disk(tmp_path / "text")
    assert hub_text(f"{tmp_path}/text:text") == "Train\nValidation\nTest"
    root = table(tmp_path, {part: [0, 1] for part in COUNTS}, datasets.ClassLabel(names=NAMES))
    datasets.load_dataset(str(root)).with_format("numpy").save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved").class_names == ("bed", "cat")


def test_labels_of_a_text_do_not_matter(tmp_path: Path):
    for part, names in (("train", ["x", "y"]), ("test", ["y", "x"])):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"text": [part], "label": [0]}, features=features)
        rows.to_parquet(tmp_path / f"{part}.parquet")
    assert hub_text(f"{tmp_path}:text") == "train\ntest"


@pytest.mark.parametrize("apart", [False, True])
def test_changed_recordings_are_read_anew(apart: bool, tmp_path: Path):
    """Recordings in the tables, or in WAV files that the tables name, behind a README.md that stays the same."""
    import pyarrow
    import pyarrow.parquet

    files = ", ".join(f"{{split: {part}, path: {part}.parquet}}" for part in COUNTS)
    (tmp_path / "README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: [{files}]}}]\n---\n")
    for first in (0, 1000):
        for part in COUNTS:
            paths = [f"{part}-{word}.wav" for word in ("bed", "cat")]
            for number, path in enumerate(paths):
                write_wav(tmp_path / path, sound(first + first_of(part) + number))
            sounds = [{"bytes": None if apart else (tmp_path / path).read_bytes(), "path": path} for path in paths]
            if not (apart and first):
                table = pyarrow.table({"audio": sounds, "word": ["bed", "cat"]})
                pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")
        clips = read(tmp_path).test.clips
        assert torch.equal(clips(torch.tensor([1]))[0], torch.from_numpy(sound(first + 201)))
